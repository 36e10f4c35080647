"""Check annotations, videos and images before a run: files, durations, truth, duplicates.

    mvrl check-data --config configs/NAME.yaml [--out problems.jsonl] [--decode]
                    [section.key=value ...]

The command reads every source of the config from end to end with the readers of a run. It writes
each problem as one line of --out, in the format of a run's quarantine.jsonl, and prints a summary.
Exit code 0: no problem; 1: some problems; 2: the config or an annotation file cannot be read, or a
file is not in the format that its `format` names.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vrl.errors import counted
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program, told_if_interrupted

if TYPE_CHECKING:
    from megatron_vrl.data.dataset_check import DatasetCheck
    from megatron_vrl.data.problems import Problem


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("problems.jsonl"),
        metavar="FILE",
        help="problems, one a line (default: problems.jsonl)",
    )
    parser.add_argument("--decode", action="store_true", help="also decode every video and image")
    parser.add_overrides()
    return parser


def main() -> int:
    return _check(make_parser().parse_intermixed_args())


def _check(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megatron_vrl.config import load_config
    from megatron_vrl.data.dataset_check import DatasetCheck, distinct_sources, num_records
    from megatron_vrl.data.problems import Problem

    cfg = load_config(arguments.config, arguments.overrides)
    check, problems = DatasetCheck(cfg, arguments.decode), list[Problem]()
    kept = f"{arguments.out} has the problems found so far; the same command begins again."
    with told_if_interrupted(lambda: kept), open(arguments.out, "w") as report:
        for source in distinct_sources(cfg):
            name = Path(source.json_path).name
            records = tqdm(
                check.problems(source), total=num_records(source), unit=" records", desc=name
            )
            for new_problems in records:
                problems += new_problems
                report.writelines(_line(problem) for problem in new_problems)
                records.set_postfix(problems=len(problems), refresh=False)
            file_problems = check.file_problems()
            problems += file_problems
            report.writelines(_line(problem) for problem in file_problems)
    if not problems and arguments.out.is_file():
        arguments.out.unlink()
    _print_summary(check, problems, arguments.out)
    return 1 if problems else 0


def _line(problem: "Problem") -> str:
    return json.dumps({"phase": "check", "step": 0} | problem.row()) + "\n"


def _print_summary(check: "DatasetCheck", problems: "Sequence[Problem]", out: Path) -> None:
    import numpy as np

    from megatron_vrl.data.problems import summary
    from megatron_vrl.observe.progress import log_written
    from megatron_vrl.types import VideoClip

    seen = check.stats.tokens.items()
    videos = [count for medium, count in seen if isinstance(medium, VideoClip)]
    images = [count for medium, count in seen if not isinstance(medium, VideoClip)]
    shown = counted(len(videos), "video")
    shown += f" and {counted(len(images), 'image')}" if images else ""
    print(f"{counted(check.stats.samples, 'sample')}, {shown} that can be read")
    if check.stats.text_only:
        print(f"{counted(check.stats.text_only, 'sample')} without a video or an image")
    for kind, tokens in {"a video": videos, "an image": images}.items():
        if tokens:
            low, middle, high = np.percentile(tokens, [0, 50, 100]).astype(int)
            print(f"tokens of {kind} ({check.family.title}): {low} to {high}, median {middle}")
    for problem in problems:
        if problem.kind == "unit":
            print(problem.reason)
    if problems:
        print(f"problems: {summary(problems)}", flush=True)
        log_written(out)
    else:
        print(f"No problems in {counted(check.stats.samples, 'sample')}.")


if __name__ == "__main__":
    run_program(main)
