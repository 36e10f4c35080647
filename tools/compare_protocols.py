#!/usr/bin/env python3
"""Compare the protocols `strict` and `clipped` of an evaluation, on answers that need no model.

    compare_protocols.py BENCHMARK=FILE [BENCHMARK=FILE ...] [--seed N] [--json]

FILE is the released annotation file of a grounding benchmark, or an excerpt of it. Both protocols
score three answers to each question: the whole video, two random times of the video, and the
published interval (the first of several). The command prints a table in percent; --json prints all
metrics as fractions.
"""

import argparse
import json
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

if TYPE_CHECKING:
    from megatron_vrl.evaluation.protocols import Protocol
    from megatron_vrl.types import Sample

PROTOCOLS: "tuple[Protocol, ...]" = ("strict", "clipped")
ANSWERS = ("whole video", "random", "published")


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("sets", nargs="+", metavar="BENCHMARK=FILE", help="docs/evaluation.md")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random answers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    pairs = [_pair(text) for text in arguments.sets]
    rows = [
        compared(name, path, answer, arguments.seed) for name, path in pairs for answer in ANSWERS
    ]
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))


def compared(name: str, annotations: str, answer: str, seed: int) -> dict[str, Any]:
    """Return the number of scored questions and the metrics of one of ANSWERS by protocol."""
    from megatron_vrl.evaluation import benchmark
    from megatron_vrl.evaluation.protocols import BENCHMARKS, Prediction, summary

    published = benchmark.questions(name, annotations, "", "strict")
    predictions = [
        Prediction(id=sample.id, response=response)
        for sample, response in zip(published, responses(published, answer, seed), strict=True)
    ]
    row: dict[str, Any] = {"benchmark": name, "answer": answer}
    for protocol in PROTOCOLS:
        samples = benchmark.questions(name, annotations, "", protocol)
        items = benchmark.items_of(name, samples, predictions, protocol)
        found = summary(BENCHMARKS[name], items)
        values = {metric: entry["value"] for metric, entry in found["metrics"].items()}
        row[protocol] = {"scored": found["scored"], **values}
    return row


def responses(samples: "Sequence[Sample]", answer: str, seed: int) -> list[str]:
    """Return one response to each sample, with times to 0.01 s."""
    draw = Random(seed)
    texts = []
    for sample in samples:
        times: Sequence[float] = sorted(draw.uniform(0, sample.duration_s) for _ in range(2))
        if answer == "whole video":
            times = (0.0, sample.duration_s)
        elif answer == "published" and sample.intervals_s:
            times = sample.intervals_s[0]
        start, end = (f"{time:.2f}" for time in times)
        option = chr(ord("A") + draw.randrange(max(1, len(sample.options))))
        option = sample.option if answer == "published" else option
        body = {"option": option, "start_time": start, "end_time": end}
        texts.append(f"<think></think><answer>{json.dumps(body)}</answer>")
    return texts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, in percent."""
    lines = [
        "| set | answers | questions | mIoU | IoU at 0.5 | IoU at 0.7, or IoP at 0.5 |",
        "|-|-|-|-|-|-|",
    ]
    for row in rows:
        names = ("miou", "iou@0.5", "iop@0.5")
        if "r1@0.5" in row["strict"]:
            names = ("miou", "r1@0.5", "r1@0.7")
        cells = [" / ".join(str(row[protocol]["scored"]) for protocol in PROTOCOLS)]
        for name in names:
            cells.append(" / ".join(f"{100 * row[protocol][name]:.2f}" for protocol in PROTOCOLS))
        lines.append(f"| {row['benchmark']} | {row['answer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(text: str) -> tuple[str, str]:
    """Return (benchmark, file) of an argument. Raises ConfigError."""
    from megatron_vrl.evaluation.protocols import BENCHMARKS

    name, _, path = text.partition("=")
    grounded = [name for name, row in BENCHMARKS.items() if "miou" in row.metrics]
    if name not in grounded or not path:
        raise ConfigError(f"{text!r} is not BENCHMARK=FILE with one of {', '.join(grounded)}.")
    return name, path


if __name__ == "__main__":
    run_program(main)
