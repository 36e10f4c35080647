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
stopped goes on when the same command is given again. --protocol seed asks and reads as the released
evaluation of Temporal-R1 does.

Writes items.jsonl (a record of every question), summary.json and, with a checkpoint,
predictions.jsonl into --out, by default runs/evaluation/NAME-WHAT. Prints a table in percent with
95 % bootstrap intervals; --json prints summary.json (shares) instead. A mistake is one sentence and
exit code 2.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_vrl.benchmark import (
    Prediction,
    items_of,
    questions,
    read_predictions,
    table,
    write_results,
)
from megatron_vrl.errors import ConfigError
from megatron_vrl.observe.quiet import hush_libraries
from megatron_vrl.program import run_program
from megatron_vrl.rewards.benchmarks import BENCHMARKS
from megatron_vrl.types import VideoSample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--benchmark", required=True, choices=list(BENCHMARKS))
    parser.add_argument("--annotations", required=True, metavar="FILE")
    parser.add_argument("--videos", default="", metavar="DIR")
    parser.add_argument("--checkpoint", default="", metavar="DIR")
    parser.add_argument("--predictions", default="", metavar="FILE")
    parser.add_argument("--protocol", default="strict", choices=["strict", "seed"])
    parser.add_argument("--plain", action="store_true", help="ask for answers without thinking")
    parser.add_argument("--config", default="", metavar="FILE", help="YAML of a run")
    parser.add_argument("--out", default="", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    found, text = _evaluate(arguments)
    print(json.dumps(found, indent=1) if arguments.json else text)


def _evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if bool(arguments.checkpoint) == bool(arguments.predictions):
        raise ConfigError("Give either --checkpoint DIR (with --videos DIR) or --predictions FILE.")
    if arguments.checkpoint and not arguments.videos:
        raise ConfigError(
            f"--checkpoint {arguments.checkpoint} needs --videos DIR to answer about."
        )
    name, protocol = arguments.benchmark, arguments.protocol
    checkpoint, predicted = Path(arguments.checkpoint).resolve(), Path(arguments.predictions)
    what = checkpoint.name if arguments.checkpoint else predicted.stem
    out = Path(arguments.out or f"runs/evaluation/{name}-{what}")
    samples = questions(name, arguments.annotations, arguments.videos, protocol)
    if arguments.predictions:
        predictions = read_predictions(predicted, samples)
    else:
        predictions = _predict(arguments, samples, out)
    found = write_results(out, name, protocol, items_of(samples, predictions, protocol))
    return found, table(found)


def _predict(
    arguments: argparse.Namespace, samples: list[VideoSample], out: Path
) -> list[Prediction]:
    hush_libraries()
    from megatron_vrl.inference import inference_config
    from megatron_vrl.predict import SEED_DEFAULTS, predict

    plain = ["data.system_prompt=answer"] if arguments.plain else []
    cfg = inference_config(
        arguments.checkpoint,
        [*plain, *arguments.overrides],
        arguments.config,
        SEED_DEFAULTS if arguments.protocol == "seed" else {},
    )
    settings = {name: vars(arguments)[name] for name in ("benchmark", "annotations", "protocol")}
    return predict(cfg, samples, out, settings)


if __name__ == "__main__":
    run_program(main)
