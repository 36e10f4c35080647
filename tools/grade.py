#!/usr/bin/env python3
"""Grade stored responses: JSON lines in, JSON lines out, one for one and in order.

    grade.py --task T [--mode strict|temporal_r1] [rewards.KEY=VALUE ...] < IN.jsonl > OUT.jsonl

A line in has the fields its task needs (others are passed over, blank lines are skipped):

    {"id": "a", "response": "<think>...", "duration_s": 30.0, "intervals_s": [[6.0, 15.0]],
     "option": "B"}

temporal_grounding needs duration_s and intervals_s, multiple_choice needs option, grounded_qa all
three. "options", the texts, may be given too; without them an option is read by its letter alone,
whatever text follows ("D. small dog").

A line out:

    {"id": "a", "score": 1.0, "parts": {"format": 1.0, "temporal_iou": 1.0},
     "parsed": {"interval_s": [6.0, 15.0]}, "failure": null}

"parts" holds the reward components, and "score" their sum by `rewards.weights` (docs/tasks.md says
what each component is). "failure" says why the response could not be read. Lines are written as
they are graded. A line that cannot be graded ends the program with one sentence and exit code 2;
the lines before it stay written.
"""

import json
import sys

from megatron_vrl.config import Rewards, Section
from megatron_vrl.config.loader import overridden
from megatron_vrl.errors import DataError
from megatron_vrl.evaluation.grading import Grader
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import protocol_name, run_program
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import TASKS


class GradeConfig(Section):
    rewards: Rewards = Rewards()


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--task", required=True, choices=list(TASKS), help="what was asked")
    parser.add_argument(
        "--mode",
        default="strict",
        type=protocol_name,
        choices=["strict", "temporal_r1"],
        help="how answers are read, default strict",
    )
    parser.add_overrides()
    arguments = parser.parse_intermixed_args()
    rewards = overridden(GradeConfig, {}, arguments.overrides, "command line").rewards
    weights = reward_weights(rewards)[arguments.task]
    _grade_all(Grader(task=arguments.task, mode=arguments.mode, weights=weights))


def _grade_all(grader: Grader) -> None:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if not line.strip():
            continue
        try:
            row = grader.grade(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} is not JSON ({error}); correct it.") from None
        except DataError as error:
            raise DataError(f"line {number}: {error}; correct it.") from None
        print(json.dumps(row, allow_nan=False), flush=True)


if __name__ == "__main__":
    run_program(main)
