#!/usr/bin/env python3
"""The command `mvrl grade` as a script: tools/grade.py ARGUMENTS."""

from megatron_vrl.cli.grade import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
