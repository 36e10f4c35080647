#!/usr/bin/env python3
"""The command `mvrl select` as a script: tools/select_data.py ARGUMENTS."""

from megatron_vrl.cli.select import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
