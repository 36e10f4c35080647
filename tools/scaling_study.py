#!/usr/bin/env python3
"""Strong and weak scaling of the trainer's update, measured, planned and simulated.

    scaling_study.py --out DIR [--config FILE] [section.key=value ...]

The study runs every cell of a grid of layouts and model sizes, each in processes of its own under
torchrun, on this machine's cores or GPUs. On several nodes, call it on each with --nnodes,
--node-rank and --rdzv-endpoint (docs/scaling.md). It writes to DIR: machine.json (the measured
machine; mvrl plan --gpu reads it), study.jsonl (a row for each cell; finished cells are not run
again), planned.jsonl (the rows beside the planner's numbers), simulated.jsonl, table.md,
measured.png and simulated.png. Layouts of up to 1,024 GPUs are simulated from measured pieces; each
such row is marked as simulated.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the study, shared by all nodes")
    add("--config", type=Path, metavar="FILE", help="YAML, see configs/studies/")
    add("--nproc", type=int, default=_env("NPROC", 0), help="most ranks of a node")
    add("--nnodes", type=int, default=_env("NNODES", 1), help="nodes (default: $NNODES or 1)")
    add(
        "--node-rank",
        type=int,
        default=_env("NODE_RANK", 0),
        help="number of this node, from 0 (default: $NODE_RANK or 0)",
    )
    meeting = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{_env('MASTER_PORT', 29600)}"
    add("--rdzv-endpoint", default=meeting, help="HOST:PORT of node 0")
    add("--retry", action="store_true", help="run failed cells again")
    add("--rank", help=argparse.SUPPRESS)  # under torchrun: a cell's spec
    parser.add_overrides()
    return parser


def main() -> None:
    arguments = make_parser().parse_intermixed_args()
    if arguments.rank:
        _rank(json.loads(arguments.rank))
        return
    if arguments.out is None:
        raise ConfigError("--out is missing: name the folder of the study.")
    from scaling.grid import read_study
    from scaling.study import nodes_of, run_study

    study = read_study(arguments.config, arguments.overrides)
    run_study(study, arguments.out, nodes_of(arguments, study), retry=arguments.retry)


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def _rank(spec: dict[str, Any]) -> None:
    """Measure one cell, or the machine, as a rank of torchrun; the first rank prints the result."""
    if "machine" in spec:
        from scaling.machine import measure

        measurements = measure(spec["machine"])
    else:
        from scaling.rank import run_cell

        measurements = run_cell(spec, Path(spec["path"]))
    if os.environ["LOCAL_RANK"] == "0":  # torchrun's first rank may be on any node
        print(json.dumps(measurements), flush=True)


if __name__ == "__main__":
    run_program(main)
