"""Update of one group, n answers to one prompt: hidden size 512, 4 layers, one thread, float32.

Layouts: `shared` computes the prompt once, `plain` once for each answer. Whole steps with a KL
term: `shared-kl` (reference pass and update, shared) and `temporal_r1` (old log-probs, reference,
update, each on n full sequences, the order of the released Temporal-R1). `trl` and `trl-kl`: TRL's
GRPOTrainer on the same sizes (pip install -e '.[bench]'). `ratio` is the median time of the row
--against over the row's own, `ideal_ratio` the ratio of token passes, a backward pass counted as
two. `peak_bytes` is the peak of the process beyond its libraries."""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.worker import Worker
from megatron_vrl.errors import ConfigError

Row = dict[str, Any]
OURS, TRL = (Path(__file__).with_name(name) for name in ("step_side.py", "trl_side.py"))
LAYOUTS = {
    "shared": OURS,
    "plain": OURS,
    "shared-kl": OURS,
    "temporal_r1": OURS,
    "trl": TRL,
    "trl-kl": TRL,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--group", type=int, default=8, help="answers to the prompt")
    parser.add_argument("--layouts", default="shared,plain", help="some of " + ",".join(LAYOUTS))
    parser.add_argument("--against", default="plain", help="row that ratios refer to")
    parser.add_argument(
        "--micro-batch", type=int, default=10**9, help="most tokens of a micro-batch"
    )


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    shape = (arguments.prompt_tokens, arguments.answer_tokens, arguments.group)
    layouts = arguments.layouts.split(",")
    unknown = [name for name in layouts if name not in LAYOUTS]
    if unknown:
        raise ConfigError(f"--layouts {','.join(unknown)}: choose of {', '.join(LAYOUTS)}.")
    options = (*shape, arguments.micro_batch)
    workers = {name: Worker(LAYOUTS[name], (name, *options)) for name in layouts}
    rounds: dict[str, list[Row]] = {name: [] for name in layouts}
    for number in range(1 + arguments.rounds):  # the first warms up
        for name, worker in workers.items():
            measured = worker.round()
            if number > 0:
                rounds[name].append(measured)
    for worker in workers.values():
        worker.close()
    medians = {name: statistics.median(r["seconds"] for r in rows) for name, rows in rounds.items()}
    base = arguments.against if arguments.against in layouts else layouts[-1]
    for name, rows in rounds.items():
        seconds = [row["seconds"] for row in rows]
        yield {
            "bench": "step",
            "layout": name,
            "prompt_tokens": shape[0],
            "answer_tokens": shape[1],
            "group": shape[2],
            "median_s": medians[name],
            "min_s": min(seconds),
            "max_s": max(seconds),
            "peak_bytes": max(row["peak_bytes"] for row in rows),
            "tokens_computed": rows[0]["tokens"],
            "ideal_ratio": rounds[base][0]["passes"] / rows[0]["passes"],
            "ratio": medians[base] / medians[name],
        }
