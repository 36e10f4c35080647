"""Evaluate a checkpoint, or stored predictions, on a benchmark.

    mvrl evaluate --benchmark NAME --annotations FILE --videos DIR --checkpoint DIR [--plain]
                  [--config RUN.yaml] [section.key=value ...]
    mvrl evaluate --benchmark NAME --annotations FILE --predictions FILE.jsonl

NAME is one of charades_sta, activitynet, activitynet_rtl, nextgqa, tvgbench, timelens_charades,
timelens_activitynet, timelens_qvhighlights, qvhighlights, mvbench, tempcompass, video_mme,
video_mme_subtitles, mmvu, mlvu, lvbench. FILE is the released annotation file
(docs/evaluation.md). A prediction is a line {"id", "response"}. The id is VIDEO/INDEX for
benchmarks keyed by video, where INDEX counts the sentences of the video, and the benchmark's own id
elsewhere. A submission to QVHighlights and a sample file of lmms-eval are read, too; --lmms-eval
writes one.

A checkpoint, Hugging Face or Megatron, answers greedily on vLLM. --plain asks for answers without
thinking. A checkpoint exported by a run is asked with the settings in its inference.yaml. --config
reads the sections video, data and rollout of a run's configuration and overrides inference.yaml;
section.key=value overrides both. The same command resumes a stopped evaluation, and asks again
about videos that could not be read before.

The protocol `strict` gives the numbers of the official scripts: truths and answers are compared as
they are. `clipped` cuts both to the video, as training does. `free_text` also reads answers in free
text. `temporal_r1` asks and parses like the released evaluation of Temporal-R1. --multi-segment
asks questions of temporal grounding for every interval and adds metrics of interval sets.

The command writes items.jsonl (one record a question), summary.json and, with a checkpoint,
predictions.jsonl into --out (default: runs/evaluation/NAME-WHAT). One process at a time may use
that folder. It prints a table in percent with 95 % bootstrap intervals; --json prints summary.json
(fractions) instead. Exit code 1: the table is printed, but more than video.max_bad_fraction of the
questions have a video that cannot be read; 2: a mistake, in one sentence.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.command_line import OverrideParser, protocol_name, tool_parser
from megatron_vrl.process.entry import run_program

if TYPE_CHECKING:
    from megatron_vrl.evaluation.protocols import Prediction
    from megatron_vrl.types import Sample


def make_parser() -> OverrideParser:
    from megatron_vrl.evaluation.protocols import BENCHMARKS

    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--benchmark", required=True, choices=list(BENCHMARKS), help="see docs/evaluation.md")
    add("--annotations", required=True, metavar="FILE", help="released annotation file")
    add("--videos", default="", metavar="DIR", help="folder of the videos")
    add("--checkpoint", default="", metavar="DIR", help="Hugging Face or Megatron checkpoint")
    add("--predictions", default="", metavar="FILE", help="JSON lines with id and response")
    add(
        "--protocol",
        default="strict",
        type=protocol_name,
        choices=["strict", "clipped", "free_text", "temporal_r1"],
        help="how answers are read and scored (default: strict)",
    )
    add(
        "--multi-segment",
        action="store_true",
        help='ask for every interval, answered as {"intervals": [[s, e], ...]}',
    )
    add("--plain", action="store_true", help="ask for answers without thinking")
    add("--config", default="", metavar="FILE", help="YAML of a run; overrides inference.yaml")
    add("--out", default="", metavar="DIR", help="default: runs/evaluation/NAME-WHAT")
    add("--lmms-eval", default="", metavar="FILE", help="write lmms-eval's sample file, .jsonl")
    add("--json", action="store_true", help="print JSON instead of a table")
    parser.add_overrides()
    return parser


def main() -> int:
    arguments = make_parser().parse_intermixed_args()
    _check(arguments)
    return _evaluate(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for arguments that cannot work, before any file is read."""
    if bool(arguments.checkpoint) == bool(arguments.predictions):
        raise ConfigError("Give either --checkpoint DIR (with --videos DIR) or --predictions FILE.")
    if arguments.checkpoint and not arguments.videos:
        raise ConfigError(
            f"--checkpoint {arguments.checkpoint} needs --videos DIR to answer about."
        )
    if arguments.videos and "://" not in arguments.videos and not Path(arguments.videos).is_dir():
        raise ConfigError(f"--videos {arguments.videos} is not a folder: correct it.")


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_vrl.evaluation import benchmark
    from megatron_vrl.observe.progress import log_written
    from megatron_vrl.process.run_lock import owned

    name, protocol = arguments.benchmark, arguments.protocol
    checkpoint, predicted = Path(arguments.checkpoint).resolve(), Path(arguments.predictions)
    what = checkpoint.name if arguments.checkpoint else predicted.stem
    out = Path(arguments.out or f"runs/evaluation/{name}-{what}")
    samples = benchmark.questions(
        name, arguments.annotations, arguments.videos, protocol, arguments.multi_segment
    )
    complaint = ""
    with owned(out):
        if arguments.predictions:
            predictions = benchmark.read_predictions(predicted, samples)
        else:
            predictions, complaint = _predict(arguments, samples, out)
        items = benchmark.items_of(name, samples, predictions, protocol)
        results = benchmark.write_results(out, name, protocol, items)
        if arguments.lmms_eval:
            benchmark.write_lmms_samples(Path(arguments.lmms_eval), name, items)
    text = json.dumps(results, indent=1) if arguments.json else benchmark.table(results)
    print(text, flush=True)
    if complaint:
        print(f"error: {complaint}", file=sys.stderr)
    log_written(out)
    return 1 if complaint else 0


def _predict(
    arguments: argparse.Namespace, samples: "list[Sample]", out: Path
) -> "tuple[list[Prediction], str]":
    """Return the predictions, and a sentence if too many videos cannot be read, else ""."""
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
    settings |= {"multi_segment": True} if arguments.multi_segment else {}
    remote = "://" in arguments.videos
    settings["videos"] = arguments.videos if remote else str(Path(arguments.videos).resolve())
    predictions = predict(cfg, samples, out, settings)
    bad = [one.problem for one in predictions if one.problem]
    return predictions, too_many_bad(bad, len(samples), cfg.video.max_bad_fraction)


if __name__ == "__main__":
    run_program(main)
