"""Parts of tools/scaling_study.py: grid, a rank, machine, prediction, simulation, tables."""
