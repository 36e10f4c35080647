#!/usr/bin/env python3
"""The command `mvrl evaluate` as a script: tools/evaluate.py ARGUMENTS."""

from megatron_vrl.cli.evaluate import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
