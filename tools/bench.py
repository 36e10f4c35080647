#!/usr/bin/env python3
"""Measure parts of the program, each beside what it is held against, on this machine.

    bench.py step [--prompt-tokens 2048 --answer-tokens 128 --group 8 --layouts shared,plain]
    bench.py head [--tokens 8192 --vocab 151936 --hidden 2048]
    bench.py decode FILES... [--frames 16]
    bench.py sync [--hidden 1024 --layers 10]
    bench.py generate [--hidden 1024 --layers 10 --dtype float32]
    bench.py update [--formats bfloat16,current --layouts shared,plain]
    bench.py convert [--model configs/models/qwen2.5-vl-3b.json --dir DIR]

A bench takes its sides in turns, in one run, and yields rows of medians over --rounds. With --json
a row is one line of JSON, else the rows are a small table.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

silence_libraries()  # some benches load them at once
from benches import convert, decode, generate, head, step, sync, update  # noqa: E402

BENCHES = {
    "convert": convert,
    "decode": decode,
    "generate": generate,
    "head": head,
    "step": step,
    "sync": sync,
    "update": update,
}
Row = dict[str, Any]


def main() -> None:
    parser = tool_parser(__doc__)
    benches = parser.add_subparsers(
        dest="bench", required=True, prog="bench.py", metavar="BENCH", help="what to measure"
    )
    for name, bench in BENCHES.items():
        options = benches.add_parser(name, description=bench.__doc__)
        options.set_defaults(run=bench.run)
        options.add_argument("--json", action="store_true", help="one JSON object a line")
        options.add_argument("--rounds", type=int, default=5, help="medians of so many")
        bench.add_options(options)
    arguments = parser.parse_args()
    run: Callable[[argparse.Namespace], Iterator[Row]] = arguments.run
    _print(list(run(arguments)), as_json=arguments.json)


def _print(rows: Sequence[Row], as_json: bool) -> None:
    if as_json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count()}
        print("\n".join(json.dumps(row | machine) for row in rows))
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [columns, *([_words(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _words(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_program(main)
