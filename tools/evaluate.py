#!/usr/bin/env python3
"""Evaluate a checkpoint, or predictions made elsewhere, on a published benchmark.

    evaluate.py --benchmark NAME --annotations FILE --videos DIR --checkpoint DIR [--plain]
                [--config RUN.yaml] [section.key=value ...]
    evaluate.py --benchmark NAME --annotations FILE --predictions FILE.jsonl

NAME is one of charades_sta, activitynet, activitynet_rtl, nextgqa, mvbench, tempcompass, video_mme,
mmvu, tvgbench; FILE is as published (docs/evaluation.md). A prediction is a line {"id",
"response"}; ids are VIDEO/INDEX for sets keyed by video, the index counting its sentences, and the
set's own elsewhere.

A checkpoint, Hugging Face or Megatron, answers greedily on vLLM. --plain asks it to answer without
thinking. The export of a run is asked as the run asked (its inference.yaml). --config takes the
sections video, data and rollout of a run's configuration; overrides come after it. A run that was
stopped goes on when the same command is given again, and asks again where a video could not be read
and now can. --protocol temporal_r1 asks and reads as the released
evaluation of Temporal-R1 does.

Writes items.jsonl (a record of every question), summary.json and, with a checkpoint,
predictions.jsonl into --out, by default runs/evaluation/NAME-WHAT. One call at a time may have that
folder. Prints a table in percent with 95 % bootstrap intervals; --json prints summary.json (shares)
instead. Exit code 1: the table is printed, but more than video.max_bad_fraction of the questions
have a video that cannot be read; 2: a mistake, in one sentence.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import protocol_name, run_program

if TYPE_CHECKING:  # imported where they are used: a Ctrl-C during an import is one line, too
    from megatron_vrl.evaluation.benchmark import Prediction
    from megatron_vrl.types import VideoSample


def main() -> int:
    from megatron_vrl.evaluation.protocols import BENCHMARKS

    parser = tool_parser(__doc__)
    parser.add_argument(
        "--benchmark", required=True, choices=list(BENCHMARKS), help="docs/evaluation.md"
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="as published")
    parser.add_argument("--videos", default="", metavar="DIR", help="folder of the videos")
    parser.add_argument(
        "--checkpoint", default="", metavar="DIR", help="Hugging Face or Megatron checkpoint"
    )
    parser.add_argument(
        "--predictions", default="", metavar="FILE", help="JSON lines with id and response"
    )
    parser.add_argument(
        "--protocol",
        default="strict",
        type=protocol_name,
        choices=["strict", "temporal_r1"],
        help="how answers are asked for and read",
    )
    parser.add_argument("--plain", action="store_true", help="ask for answers without thinking")
    parser.add_argument(
        "--config", default="", metavar="FILE", help="YAML of a run; goes before inference.yaml"
    )
    parser.add_argument(
        "--out", default="", metavar="DIR", help="default runs/evaluation/NAME-WHAT"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_overrides()
    arguments = parser.parse_intermixed_args()
    _check(arguments)
    return _evaluate(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for arguments that cannot work, before anything is read."""
    if bool(arguments.checkpoint) == bool(arguments.predictions):
        raise ConfigError("Give either --checkpoint DIR (with --videos DIR) or --predictions FILE.")
    if arguments.checkpoint and not arguments.videos:
        raise ConfigError(
            f"--checkpoint {arguments.checkpoint} needs --videos DIR to answer about."
        )
    if arguments.videos and "://" not in arguments.videos and not Path(arguments.videos).is_dir():
        raise ConfigError(f"--videos {arguments.videos} is not a folder: correct it.")


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_vrl.evaluation.benchmark import (
        items_of,
        questions,
        read_predictions,
        table,
        write_results,
    )
    from megatron_vrl.observe.progress import log_written
    from megatron_vrl.process.run_lock import owned

    name, protocol = arguments.benchmark, arguments.protocol
    checkpoint, predicted = Path(arguments.checkpoint).resolve(), Path(arguments.predictions)
    what = checkpoint.name if arguments.checkpoint else predicted.stem
    out = Path(arguments.out or f"runs/evaluation/{name}-{what}")
    samples = questions(name, arguments.annotations, arguments.videos, protocol)
    complaint = ""
    with owned(out):
        if arguments.predictions:
            predictions = read_predictions(predicted, samples)
        else:
            predictions, complaint = _predict(arguments, samples, out)
        found = write_results(out, name, protocol, items_of(samples, predictions, protocol))
    print(json.dumps(found, indent=1) if arguments.json else table(found), flush=True)
    if complaint:
        print(f"error: {complaint}", file=sys.stderr)
    log_written(out)
    return 1 if complaint else 0


def _predict(
    arguments: argparse.Namespace, samples: "list[VideoSample]", out: Path
) -> "tuple[list[Prediction], str]":
    """Return the predictions, and a sentence if too many videos cannot be read."""
    from megatron_vrl.observe.silence_logs import silence_libraries

    silence_libraries()
    from megatron_vrl.evaluation.generate import inference_config
    from megatron_vrl.evaluation.predict import TEMPORAL_R1_DEFAULTS, predict, too_many_bad

    plain = ["data.system_prompt=answer"] if arguments.plain else []
    cfg = inference_config(
        arguments.checkpoint,
        [*plain, *arguments.overrides],
        arguments.config,
        TEMPORAL_R1_DEFAULTS if arguments.protocol == "temporal_r1" else {},
    )
    settings = {name: vars(arguments)[name] for name in ("benchmark", "annotations", "protocol")}
    remote = "://" in arguments.videos
    settings["videos"] = arguments.videos if remote else str(Path(arguments.videos).resolve())
    predictions = predict(cfg, samples, out, settings)
    bad = [one.problem for one in predictions if one.problem]
    return predictions, too_many_bad(bad, len(samples), cfg.video.max_bad_fraction)


if __name__ == "__main__":
    run_program(main)
