"""Planner: memory and step time of a configuration on given GPUs, by arithmetic.

The planner uses the program's own layout checks, weight map, FLOP counts and video rules. It
allocates nothing and creates no process group. docs/planner.md says what is counted, how accurate
it is, and what is left out.
"""
