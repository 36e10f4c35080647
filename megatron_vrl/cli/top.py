"""Follow a run from another terminal: state, progress, metrics with their curves, time of a step.

    mvrl top RUN_DIR [--every 5]
    mvrl top RUN_DIR --once

The view is built from the files in RUN_DIR alone and is printed again until the run ends, or until
Ctrl-C. Printed once if the output is not a terminal.
"""

import argparse
import sys
import time
from pathlib import Path

from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

CLEAR = "\x1b[H\x1b[J"  # cursor to the top left corner, and clear what follows


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path, help="run.out_dir of a run")
    add(
        "--every", type=_seconds, default=5.0, metavar="S", help="seconds between views (default 5)"
    )
    add("--once", action="store_true", help="print one view and end")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    from megatron_vrl.observe.top import view

    is_live = sys.stdout.isatty() and not arguments.once
    while True:
        lines, is_running = view(arguments.run)
        print((CLEAR if is_live else "") + "\n".join(lines), flush=True)
        if not (is_live and is_running):
            return
        time.sleep(arguments.every)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.2 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.2 and 3600 seconds")
    return value


if __name__ == "__main__":
    run_program(main)
