#!/usr/bin/env python3
"""The command `mvrl score` as a script: tools/score_responses.py ARGUMENTS."""

from megatron_vrl.cli.score import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
