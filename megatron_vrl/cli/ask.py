"""Ask a checkpoint one question about a video, or about any videos and images.

    mvrl ask --checkpoint DIR --question TEXT [--video FILE ...] [--image FILE ...] [--task T]
             [--option TEXT ...] [--json] [--plain] [--config RUN.yaml] [--strip FILE.png]
             [section.key=value ...]

T is temporal_grounding (default: when does the event TEXT happen?), multi_segment_grounding (all
intervals in which it happens), multiple_choice or grounded_qa. The last two choose among the
--option texts. multiple_choice takes any videos and images, or none; the others take exactly one
video. The files are shown in the order of the command line, before the question, or at the places
of the character U+FFFC in it. The checkpoint, Hugging Face or Megatron, answers greedily on vLLM.
The command prints the thinking, the interval in seconds and the option that the task's parser
reads. It writes a strip of frames with the interval marked, or several videos and images below each
other. --plain asks for an answer without thinking.

A checkpoint exported by a run is asked with the settings in its inference.yaml. --config reads the
sections video, data, rollout and evaluation of a run's configuration and overrides inference.yaml.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError, VideoError, counted
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program


def make_parser() -> OverrideParser:
    from megatron_vrl.tasks import TASKS
    from megatron_vrl.types import ImageFile, VideoClip

    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="Hugging Face or Megatron checkpoint")
    add_file = partial(add, action="append", dest="media", default=[], metavar="FILE")
    add_file("--video", type=VideoClip, help="path or URL of a video; repeat for more")
    add_file("--image", type=ImageFile, help="path or URL of an image; repeat for more")
    add("--question", required=True, metavar="TEXT", help="an event, or a question")
    add(
        "--task",
        default="temporal_grounding",
        choices=list(TASKS),
        help="kind of question (default: temporal_grounding)",
    )
    add("--option", action="append", default=[], metavar="TEXT", help="an option; repeat for more")
    add("--plain", action="store_true", help="ask for an answer without thinking")
    add("--config", default="", metavar="FILE", help="YAML of a run; overrides inference.yaml")
    add(
        "--strip",
        default="ask.png",
        type=Path,
        metavar="FILE",
        help="picture to write (default: ask.png)",
    )
    add("--json", action="store_true", help="print JSON instead of text")
    parser.add_overrides()
    return parser


def main() -> None:
    arguments = make_parser().parse_intermixed_args()
    from megatron_vrl.observe.progress import log_written

    answer, text = _ask(arguments)
    print(json.dumps(answer, indent=1) if arguments.json else text, flush=True)
    if "strip" in answer:
        log_written(arguments.strip)


def _ask(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the answer as a JSON object and as text."""
    from megatron_vrl.observe.silence_logs import silence_libraries
    from megatron_vrl.tasks import TASKS

    chooses = TASKS[arguments.task].truth.option
    _check(arguments, chooses)
    silence_libraries()
    from megatron_vrl.evaluation.ask import Question, as_text, ask
    from megatron_vrl.evaluation.generate import inference_config

    plain = ["data.system_prompt=answer"] if arguments.plain else []
    overrides = [*plain, *arguments.overrides]
    cfg = inference_config(arguments.checkpoint, overrides, arguments.config)
    question = Question(
        media=tuple(arguments.media),
        text=arguments.question,
        task=arguments.task,
        options=tuple(arguments.option) if chooses else (),
    )
    answer = ask(cfg, question, arguments.strip)
    return answer, as_text(answer)


def _check(arguments: argparse.Namespace, chooses: bool) -> None:
    """Raise ConfigError or VideoError for arguments that cannot work, before an engine starts."""
    from megatron_vrl.tasks import TASKS
    from megatron_vrl.types import MEDIA_PLACE, VideoClip

    if chooses and not 2 <= len(arguments.option) <= 26:
        raise ConfigError(
            f"--task {arguments.task} chooses among 2 to 26 options, and {len(arguments.option)} "
            "are given: add --option TEXT."
        )
    if arguments.strip.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--strip {arguments.strip} is no picture; name a .png file.")
    for medium in arguments.media:
        if "://" not in medium.path and not Path(medium.path).is_file():
            option = "--video" if isinstance(medium, VideoClip) else "--image"
            raise VideoError(f"{option} {medium.path} is not a file: correct it.", "missing")
    videos = sum(isinstance(medium, VideoClip) for medium in arguments.media)
    if TASKS[arguments.task].needs_one_video and videos != 1:
        raise ConfigError(
            f"--task {arguments.task} needs exactly one --video, and {videos} are given: correct "
            "them, or choose another --task."
        )
    places = arguments.question.count(MEDIA_PLACE)
    if places and places != len(arguments.media):
        raise ConfigError(
            f"--question has {counted(places, 'place')} (U+FFFC) for {len(arguments.media)} videos "
            "and images: correct it."
        )


if __name__ == "__main__":
    run_program(main)
