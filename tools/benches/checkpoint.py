"""Host memory and seconds of a save, beside the bytes that are written.

Sides: `ours` and `gathered`, Megatron's format `fully_reshardable`. Random bfloat16 weights and
float32 optimizer state. After a save has begun, values are written again as by an update, and the
system copies what the forked writers share: the values that the rank saves, or with `--rewrite all`
every weight and optimizer state. `peak_ratio`: extra host memory of a rank and its
writers, of the rank where it is largest, over an equal share of the checkpoint. `node_ratio`: extra
memory of all ranks over the checkpoint. `most_written`: files of the rank that writes most, over an
equal share. `stall_s`: seconds until training goes on. `total_s`: until the save is committed."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vrl.errors import UserError

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
SIDES = ("ours", "gathered")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--layers", type=int, default=6, help="language layers")
    parser.add_argument(
        "--rewrite", choices=["saved", "all"], default="saved", help="what is written meanwhile"
    )
    parser.add_argument("--sides", default=",".join(SIDES), help="some of " + ",".join(SIDES))
    parser.add_argument("--dir", type=Path, default=None, help="folder with room for the files")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            rounds = _measured(ranks, arguments, Path(folder))
        for side, found in rounds.items():
            yield {
                "bench": "checkpoint",
                "ranks": ranks,
                "side": side,
                "mib": found[0]["bytes"] / 2**20,
                **{
                    name: statistics.median(each[name] for each in found)
                    for name in ("most_written", "peak_ratio", "node_ratio", "stall_s", "total_s")
                },
                "rounds": len(found),
            }


def _measured(ranks: int, arguments: argparse.Namespace, folder: Path) -> dict[str, list[Row]]:
    """Return the rounds of each side, from a launch of `ranks` processes."""
    options = {
        "sides": arguments.sides.split(","),
        "rounds": arguments.rounds,
        "every": arguments.rewrite == "all",
        **{name: getattr(arguments, name) for name in ("tensor", "hidden", "layers")},
    }
    torchrun = ROOT / "launch" / "torchrun.py"
    program = [Path(__file__).with_name("checkpoint_side.py"), json.dumps(options), folder]
    command = [sys.executable, torchrun, "--standalone", "--nproc-per-node", ranks, *program]
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{ranks} ranks failed; their output is above.")
    rounds: dict[str, list[Row]] = json.loads(done.stdout.splitlines()[-1])
    return rounds
