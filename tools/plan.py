#!/usr/bin/env python3
"""The command `mvrl plan` as a script: tools/plan.py ARGUMENTS."""

from megatron_vrl.cli.plan import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
