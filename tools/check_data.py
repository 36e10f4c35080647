#!/usr/bin/env python3
"""The command `mvrl check-data` as a script: tools/check_data.py ARGUMENTS."""

from megatron_vrl.cli.check_data import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
