#!/usr/bin/env python3
"""Rehearse an update at the real size and layout on fake GPUs, which have no memory.

    rehearse.py CONFIG [--rank R | --all-ranks] [--batch B] [--json] [section.key=value ...]

The program's own update runs on tensors that have shape, dtype and device, and no memory: forward
and backward passes, the reduction of gradients, the optimizer's step. Nothing is computed, and no
GPU is needed. The command prints the live bytes of one rank by phase beside the planner's, its
operations, and its collectives by process group. A pass that reads a value from the GPU is an
error. A C++ compiler is needed. What is left out: docs/planner.md.

Ranks that run the same operations on the same shapes are rehearsed once. Transformer Engine's
kernels have no fake form: Megatron's layers in bfloat16 take their place.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.process import fake_gpu
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

GIB = 2**30
BATCHES = ("answers", "videos", "prompt")  # in the order of `workload.worst_batches`
STAND_IN = "Transformer Engine and FP8 are not rehearsed: these are Megatron's layers in bfloat16."


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML, see configs/")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--rank", type=int, default=0, metavar="R", help="rank to rehearse (default: 0)"
    )
    which.add_argument("--all-ranks", action="store_true", help="one process for each kind of rank")
    add("--processes", type=int, metavar="N", help="ranks (default: parallel.processes)")
    add("--micro-batches", type=int, metavar="M", help="default: 1, or twice the pipeline stages")
    add(
        "--batch",
        choices=BATCHES,
        default="answers",
        help="micro-batch: longest answers (default), as many videos as fit, or longest prompt",
    )
    add("--jobs", type=int, metavar="J", help="processes at a time (default: one for each CPU)")
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
    rows = _all_ranks(cfg, arguments, world) if arguments.all_ranks else []
    rows = rows or [_rehearsed(cfg, arguments, world)]
    if arguments.json:
        print(json.dumps(rows if arguments.all_ranks else rows[0], indent=1))
    else:
        stands_in = "transformer_engine" in (cfg.model.layers, cfg.model.attention)
        print("\n\n".join([STAND_IN] * stands_in + [table(row) for row in rows]))
    return 0


def _rehearsed(cfg: Any, arguments: argparse.Namespace, world: int) -> dict[str, Any]:
    """Return the counts of --rank, as JSON values."""
    fake_gpu.install()
    from megatron_vrl.observe.silence_logs import silence_libraries

    silence_libraries()
    from dataclasses import asdict

    from megatron_vrl.cli.plan import architecture_of
    from megatron_vrl.rehearsal.rehearse import default_micro_batches, rehearse

    count = arguments.micro_batches or default_micro_batches(cfg)
    arch = architecture_of(cfg)
    batch = _batch(cfg, arch, arguments.batch)
    return asdict(rehearse(cfg, arch, batch, arguments.rank, world, count))


def _batch(cfg: Any, arch: Any, name: str) -> Any:
    """Return the planned micro-batch that --batch names."""
    from megatron_vrl.models.families import family_of
    from megatron_vrl.planner.workload import row_multiple, step_sizes, worst_batches

    family = family_of(arch)
    cases = worst_batches(cfg, family, step_sizes(cfg, family), row_multiple(cfg), given=False)
    return dict(zip(BATCHES, cases, strict=True))[name]


def _all_ranks(cfg: Any, arguments: argparse.Namespace, world: int) -> list[dict[str, Any]]:
    """Return the counts of one rank of each kind, with the ranks that equal it."""
    from megatron_vrl.cli.plan import architecture_of
    from megatron_vrl.rehearsal.ranks import distinct_ranks

    arch = architecture_of(cfg)
    kinds = distinct_ranks(cfg, arch, _batch(cfg, arch, arguments.batch), world)
    with ThreadPoolExecutor(arguments.jobs or os.cpu_count()) as pool:
        rows = list(pool.map(lambda rank: _in_process(arguments, rank), kinds))
    return [row | {"equal_ranks": kinds[row["rank"]]} for row in rows]


def _in_process(arguments: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Return the counts of `rank`, rehearsed by a process of its own."""
    command = [sys.executable, __file__, arguments.config, "--rank", str(rank), "--json"]
    for name in ("processes", "micro_batches", "batch"):
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
    equal = [rank for rank in row.get("equal_ranks", ()) if rank != row["rank"]]
    lines = [
        f"rank {row['rank']}, stage {row['stage']}: "
        f"{counted(row['micro_batches'], 'micro-batch')} of {row['rows']} rows"
    ]
    if equal:
        lines.append(f"equal, and not run: {counted(len(equal), 'rank')}, {spans(equal)}")
    lines.append(f"{'GiB':<28}{'rehearsed':>11}{'planned':>11}{'ratio':>8}")
    for name, (rehearsed, planned) in row["memory"].items():
        beside = f"{planned / GIB:11.3f}{rehearsed / planned:8.3f}" if planned else ""
        lines.append(f"{name:<28}{rehearsed / GIB:11.3f}{beside}")
    for phase, peak in row["peaks"].items():
        lines.append(f"{'peak of ' + phase:<28}{peak / GIB:11.3f}")
    lines.append(f"{'operations':<28}{'all':>11}{'a vision':>11}{'a language layer':>18}")
    for phase, parts in row["operations"].items():
        each = [
            parts.get(f"{part} layers", 0) / max(1, row["layers"][part]) for part in row["layers"]
        ]
        vision, language = (count / row["micro_batches"] for count in each)
        lines.append(f"{phase:<28}{sum(parts.values()):11,}{vision:11.1f}{language:18.1f}")
    reads = row["host_reads"]
    lines.append(f"host reads: 0 in a pass (each would be an error), {reads} after the passes")
    lines.append(f"{'collectives':<42}{'calls':>8}{'planned':>9}{'GiB':>10}{'planned':>9}")
    for each in row["collectives"]:
        what = f"{each['phase']}: {each['operation']} over {each['axis']}"
        (calls, of_plan), sizes = each["calls"], [size / GIB for size in each["bytes"]]
        beside = (
            f"{of_plan:9,}{sizes[0]:10.3f}{sizes[1]:9.3f}" if of_plan else f"{'':9}{sizes[0]:10.3f}"
        )
        lines.append(f"{what:<42}{calls:8,}{beside}")
    return "\n".join(lines)


def spans(ranks: list[int]) -> str:
    """Return the numbers as text, those in a row as one span: "1-3, 8"."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


if __name__ == "__main__":
    run_program(main)
