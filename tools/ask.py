#!/usr/bin/env python3
"""The command `mvrl ask` as a script: tools/ask.py ARGUMENTS."""

from megatron_vrl.cli.ask import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
