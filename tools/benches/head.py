"""Log-probs and entropies of N tokens, forward and backward: chunked head beside whole logits.

The naive side is plain torch in float32. `extra_bytes` is the peak beyond inputs and gradients,
`of_logits` that peak over the bytes of float32 logits, `ratio` the time over the naive side's. The
naive side holds the logits four times: give it room, or --skip-naive."""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.worker import Worker

Row = dict[str, Any]
SIDE = Path(__file__).with_name("head_side.py")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192, help="rows of hidden states")
    parser.add_argument("--vocab", type=int, default=151936, help="words of the vocabulary")
    parser.add_argument("--hidden", type=int, default=2048, help="channels of a hidden state")
    parser.add_argument("--skip-naive", action="store_true", help="memory of the chunked side only")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    shape = (arguments.tokens, arguments.vocab, arguments.hidden)
    sides = ["chunked"] if arguments.skip_naive else ["chunked", "naive"]
    workers = {name: Worker(SIDE, (name, *shape)) for name in sides}
    rounds: dict[str, list[Row]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            rounds[name].append(worker.round())
    for worker in workers.values():
        worker.close()
    medians = {name: statistics.median(r["seconds"] for r in rows) for name, rows in rounds.items()}
    logits = 4 * arguments.tokens * arguments.vocab
    for name, rows in rounds.items():
        extra = max(row["peak_bytes"] for row in rows)
        yield {
            "bench": "head",
            "side": name,
            "tokens": arguments.tokens,
            "vocab": arguments.vocab,
            "hidden": arguments.hidden,
            "median_s": medians[name],
            "ratio": medians[name] / medians[sides[-1]],
            "extra_bytes": extra,
            "of_logits": extra / logits,
        }
