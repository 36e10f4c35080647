"""What a run would need and how long a step would take, by arithmetic, on GPUs that are not here.

Built from the same pieces as the program: its checks of a layout, its table of parameters, its
counts of work, its rules for videos. Nothing is allocated and no process group is made. What is
counted, how well it holds and what it leaves out: docs/planner.md.
"""
