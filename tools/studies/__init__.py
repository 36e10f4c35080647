"""Parts of tools/quickstart_study.py: settings, pools, jobs, arms, bootstrap, tables."""
