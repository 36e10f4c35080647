#!/usr/bin/env python3
"""Ask a checkpoint one question about one video.

    ask.py --checkpoint DIR --video FILE --question TEXT [--task T] [--option TEXT ...] [--json]
           [--plain] [--config RUN.yaml] [--strip FILE.png] [section.key=value ...]

T is temporal_grounding (the default: when does TEXT happen?), multiple_choice or grounded_qa; the
latter two choose among the --option texts. The checkpoint, Hugging Face or Megatron, answers
greedily on vLLM. Prints the thinking, the interval in seconds and the option as they are read, and
writes a strip of frames with the interval marked (by default ask.png). --plain asks for an answer
without thinking. The export of a run is asked as the run asked (its inference.yaml); --config takes
the sections video, data, rollout and evaluation of a run's configuration and goes before it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.observe.progress import log_written
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program


def main() -> None:
    from megatron_vrl.tasks import TASKS  # here: a Ctrl-C during an import is one line, too

    parser = tool_parser(__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="Hugging Face or Megatron checkpoint"
    )
    parser.add_argument("--video", required=True, metavar="FILE", help="path or URL of the video")
    parser.add_argument(
        "--question", required=True, metavar="TEXT", help="an event, or what is asked"
    )
    parser.add_argument(
        "--task",
        default="temporal_grounding",
        choices=list(TASKS),
        help="default temporal_grounding",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="TEXT",
        help="one of the options; repeat it",
    )
    parser.add_argument("--plain", action="store_true", help="ask for an answer without thinking")
    parser.add_argument(
        "--config", default="", metavar="FILE", help="YAML of a run; goes before inference.yaml"
    )
    parser.add_argument(
        "--strip", default="ask.png", type=Path, metavar="FILE", help="picture, default ask.png"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_overrides()
    arguments = parser.parse_intermixed_args()
    found, text = _ask(arguments)
    print(json.dumps(found, indent=1) if arguments.json else text, flush=True)
    log_written(arguments.strip)


def _ask(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from megatron_vrl.tasks import TASKS

    chooses = TASKS[arguments.task].truth.option
    if chooses and not 2 <= len(arguments.option) <= 26:
        raise ConfigError(
            f"--task {arguments.task} chooses among 2 to 26 options, and {len(arguments.option)} "
            "are given: add --option TEXT."
        )
    if arguments.strip.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--strip {arguments.strip} is no picture; name a .png file.")
    if "://" not in arguments.video and not Path(arguments.video).is_file():
        raise VideoError(f"--video {arguments.video} is not a file: correct it.", "missing")
    silence_libraries()
    from megatron_vrl.evaluation.ask import Question, as_text, ask
    from megatron_vrl.evaluation.generate import inference_config

    plain = ["data.system_prompt=answer"] if arguments.plain else []
    overrides = [*plain, *arguments.overrides]
    cfg = inference_config(arguments.checkpoint, overrides, arguments.config)
    question = Question(
        video=arguments.video,
        text=arguments.question,
        task=arguments.task,
        options=tuple(arguments.option) if chooses else (),
    )
    found = ask(cfg, question, arguments.strip)
    return found, as_text(found)


if __name__ == "__main__":
    run_program(main)
