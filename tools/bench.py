#!/usr/bin/env python3
"""Measure parts of the program beside a baseline, on this machine.

    bench.py step [--prompt-tokens 2048 --answer-tokens 128 --group 8 --layouts shared,plain]
    bench.py head [--tokens 8192 --vocab 151936 --hidden 2048]
    bench.py decode FILES... [--frames 16]
    bench.py sync [--hidden 1024 --layers 10]
    bench.py generate [--hidden 1024 --layers 10 --dtype float32]
    bench.py ops [--dtype bfloat16 --recompute none --by-name]
    bench.py update [--formats bfloat16,current --layouts shared,plain]
    bench.py checkpoint [--ranks 1 2 --hidden 512 --layers 6]
    bench.py convert [--model configs/models/qwen2.5-vl-3b.json --dir DIR]

A bench runs its sides in turns within one call and prints the medians over --rounds, one row a
side: a table, or with --json one JSON object a line.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

BENCHES = {  # name, which is a module in tools/benches -> help
    "checkpoint": "save of a run's checkpoint beside the bytes written",
    "convert": "checkpoint conversion beside plain copies",
    "decode": "decoders beside a sequential read",
    "generate": "rollouts of an engine",
    "head": "chunked log-probs beside whole logits",
    "ops": "operations, bytes and host reads of an update and its parts",
    "step": "update of one group, by layout",
    "sync": "weight sync beside a plain copy",
    "update": "update of one group on a GPU, by number format",
}
Row = dict[str, Any]


def main() -> None:
    arguments = make_parser(sys.argv[1:2]).parse_args()
    run: Callable[[argparse.Namespace], Iterator[Row]] = arguments.run
    _print(list(run(arguments)), as_json=arguments.json)


def make_parser(chosen: Sequence[str] = ()) -> OverrideParser:
    """Return the parser; only the `chosen` benches are imported and have their options."""
    parser = tool_parser(__doc__)
    benches = parser.add_subparsers(dest="bench", required=True, prog="bench.py", metavar="BENCH")
    for name, text in BENCHES.items():
        options = benches.add_parser(name, help=text)
        if name not in chosen:
            continue
        silence_libraries()
        bench = import_module(f"benches.{name}")
        options.description = bench.__doc__
        options.set_defaults(run=bench.run)
        options.add_argument("--json", action="store_true", help="print one JSON object a line")
        options.add_argument("--rounds", type=int, default=5, help="rounds to take medians of")
        bench.add_options(options)
    return parser


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
