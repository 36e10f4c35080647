#!/usr/bin/env python3
"""Rehearse every rank of several configs, and print Markdown tables beside the plan.

    rehearsal_table.py CONFIG [CONFIG ...] [--batches answers videos prompt] [--jobs J]

One table has the memory of every kind of rank, one the operations of a layer, one the collectives
of an update. docs/results/rehearsal.md was made so. Ratios are rehearsed by planned.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

GIB = 2**30
TOOL = Path(__file__).with_name("rehearse.py")
HEADS = {
    "memory": "config | ranks | stage | micro-batch | rows | held, GiB | passes, GiB | planned | "
    "ratio | update, GiB | planned | ratio",
    "operations": "config | stage | a vision layer, forward; backward | a language layer | "
    "an update in all",
    "collectives": "config | stage | phase | operation | over | calls | planned | GiB | planned",
}


def main() -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML, see configs/")
    parser.add_argument(
        "--batches",
        nargs="+",
        default=["answers", "videos"],
        metavar="B",
        help="micro-batches, as rehearse.py's --batch (default: answers videos)",
    )
    parser.add_argument("--jobs", type=int, metavar="J", help="processes at a time")
    arguments = parser.parse_args()
    lines: dict[str, list[str]] = {name: [] for name in HEADS}
    for config in arguments.configs:
        for batch in arguments.batches:
            for row in _rows(arguments, config, batch):
                row |= {"config": Path(config).stem, "batch": batch}
                lines["memory"].append(memory_line(row))
                if batch == arguments.batches[0]:
                    lines["operations"].append(operations_line(row))
                    lines["collectives"] += collective_lines(row)
    for name, head in HEADS.items():
        columns = head.count("|") + 1
        print(f"| {head} |", "|" + "-|" * columns, *lines[name], "", sep="\n")
    return 0


def _rows(arguments: argparse.Namespace, config: str, batch: str) -> list[dict[str, Any]]:
    """Return the counts of each kind of rank of `config`."""
    command = [sys.executable, str(TOOL), config, "--all-ranks", "--json", "--batch", batch]
    if arguments.jobs:
        command += ["--jobs", str(arguments.jobs)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(f"{config}: {lines[-1].removeprefix('error: ')}")
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    return rows


def memory_line(row: dict[str, Any]) -> str:
    """Return the row of the memory table for one kind of rank."""
    memory = row["memory"]
    held = sum(memory[name][0] for name in ("weights", "gradients", "optimizer", "reference"))
    cells = [row["config"], str(len(row["equal_ranks"])), str(row["stage"]), row["batch"]]
    cells += [f"{row['rows']:,}", f"{held / GIB:.2f}"]
    for name in ("passes", "update"):
        rehearsed, planned = memory[name]
        cells += [f"{rehearsed / GIB:.3f}", f"{planned / GIB:.3f}", f"{rehearsed / planned:.4f}"]
    return _line(cells)


def operations_line(row: dict[str, Any]) -> str:
    """Return the row of the operations table for one kind of rank."""
    cells = [row["config"], str(row["stage"])]
    for part, layers in row["layers"].items():
        calls = max(1, layers * row["micro_batches"])
        forward, backward = (
            row["operations"][phase].get(f"{part} layers", 0) / calls
            for phase in ("forward", "backward")
        )
        cells.append(f"{forward:.0f}; {backward:.0f}" if layers else "")
    phases = ("reference", "forward", "backward", "step")
    total = sum(sum(row["operations"].get(phase, {}).values()) for phase in phases)
    return _line([*cells, f"{total:,}"])


def collective_lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield the rows of the collectives table for one kind of rank."""
    for each in row["collectives"]:
        if not each["calls"][1]:  # what the host needs to know: a few numbers
            continue
        cells = [row["config"], str(row["stage"]), each["phase"], each["operation"], each["axis"]]
        cells += [f"{calls:,}" for calls in each["calls"]]
        cells += [f"{size / GIB:.3f}" for size in each["bytes"]]
        yield _line(cells)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    run_program(main)
