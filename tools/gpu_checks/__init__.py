"""Programs of tools/gpu_check.py, and the list of its parts."""
