#!/usr/bin/env python3
"""The command `mvrl convert` as a script: tools/convert_checkpoint.py ARGUMENTS."""

from megatron_vrl.cli.convert import main
from megatron_vrl.process.entry import run_program

if __name__ == "__main__":
    run_program(main)
