#!/usr/bin/env python3
"""Rehearse an update at the real size and layout on fake GPUs, which have no memory.

    rehearse.py CONFIG [--rank R | --all-ranks] [--json] [section.key=value ...]

The program's own forward and backward passes and the reduction of gradients run on tensors that
have shape, dtype and device, and no memory. Nothing is computed, and no GPU is needed. The command
prints the live bytes of one rank by phase beside the planner's, its operations, and its collectives
by process group. A pass that reads a value from the GPU is an error. A C++ compiler is needed. What
is left out: docs/planner.md.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.process import fake_gpu
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

GIB = 2**30


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML, see configs/")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--rank", type=int, default=0, metavar="R", help="rank to rehearse (default: 0)"
    )
    which.add_argument("--all-ranks", action="store_true", help="one process after the other")
    add("--processes", type=int, metavar="N", help="ranks (default: parallel.processes)")
    add("--micro-batches", type=int, metavar="M", help="default: 1, or twice the pipeline stages")
    add("--json", action="store_true", help="print JSON: bytes and counts")
    parser.add_overrides()
    return parser


def main() -> int:
    arguments = make_parser().parse_intermixed_args()
    from megatron_vrl.config import load_config

    cfg = load_config(arguments.config, arguments.overrides)
    parallel = cfg.parallel
    world = arguments.processes or parallel.processes
    world = world or parallel.tensor * parallel.context * parallel.pipeline
    if not 0 <= arguments.rank < world:
        raise ConfigError(
            f"--rank {arguments.rank} is not one of the {world} ranks: give 0 to {world - 1}."
        )
    if arguments.all_ranks:
        rows = [_in_process(arguments, rank) for rank in range(world)]
    else:
        rows = [_rehearsed(cfg, arguments, world)]
    if arguments.json:
        print(json.dumps(rows if arguments.all_ranks else rows[0], indent=1))
    else:
        print("\n\n".join(map(table, rows)))
    return 0


def _rehearsed(cfg: Any, arguments: argparse.Namespace, world: int) -> dict[str, Any]:
    """Return the counts of --rank, as JSON values."""
    fake_gpu.install()
    from megatron_vrl.observe.silence_logs import silence_libraries

    silence_libraries()
    from dataclasses import asdict

    from megatron_vrl.cli.plan import architecture_of
    from megatron_vrl.rehearsal.rehearse import rehearse

    found = rehearse(cfg, architecture_of(cfg), arguments.rank, world, arguments.micro_batches)
    return asdict(found)


def _in_process(arguments: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Return the counts of `rank`, rehearsed by a process of its own."""
    command = [sys.executable, __file__, arguments.config, "--rank", str(rank), "--json"]
    for name in ("processes", "micro_batches"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    run = subprocess.run([*command, *arguments.overrides], capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(f"Rank {rank}: {lines[-1].removeprefix('error: ')}")
    row: dict[str, Any] = json.loads(run.stdout)
    return row


def table(row: dict[str, Any]) -> str:
    """Return the counts of one rank as text."""
    lines = [
        f"rank {row['rank']}, stage {row['stage']}: "
        f"{counted(row['micro_batches'], 'micro-batch')} of {row['rows']} rows",
        f"{'GiB':<28}{'rehearsed':>11}{'planned':>11}{'ratio':>8}",
    ]
    for name, (rehearsed, planned) in row["memory"].items():
        beside = f"{planned / GIB:11.3f}{rehearsed / planned:8.3f}" if planned else ""
        lines.append(f"{name:<28}{rehearsed / GIB:11.3f}{beside}")
    lines.append(f"{'operations':<28}{'all':>11}{'a vision':>11}{'a language layer':>18}")
    for phase, parts in row["operations"].items():
        each = [
            parts.get(f"{part} layers", 0) / max(1, row["layers"][part]) for part in row["layers"]
        ]
        vision, language = (count / row["micro_batches"] for count in each)
        lines.append(f"{phase:<28}{sum(parts.values()):11,}{vision:11.1f}{language:18.1f}")
    lines.append("host reads in a pass: 0 (each would be an error)")
    for each in row["collectives"]:
        what = f"{each['operation']} over {each['axis']}"
        lines.append(f"{what:<50}{each['calls']:7,} calls {each['bytes'] / GIB:10.3f} GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
