"""Score stored responses: JSON lines in, JSON lines out, one for one and in order.

    mvrl grade --task T [--mode strict|answer_only|temporal_r1] [rewards.KEY=VALUE ...]
               < IN.jsonl > OUT.jsonl

An input line has the fields that its task needs. Other fields are ignored, blank lines skipped:

    {"id": "a", "response": "<think>...", "duration_s": 30.0, "intervals_s": [[6.0, 15.0]],
     "option": "B"}

temporal_grounding and multi_segment_grounding need duration_s and intervals_s, multiple_choice
needs option, grounded_qa needs all three, short_answer needs "truth": {"answer": "42"}. "options",
the texts of the options, is optional: without it an option is read by its letter alone, whatever
text follows ("D. small dog").

An output line:

    {"id": "a", "score": 1.0, "parts": {"format": 1.0, "temporal_iou": 1.0},
     "parsed": {"interval_s": [6.0, 15.0]}, "failure": null}

"score" is the sum of the reward components by the weights of section `rewards` (docs/tasks.md
defines each component). "failure" is the reason why the response could not be parsed. Lines are
written as they are scored. A line that cannot be scored ends the program with one sentence and exit
code 2; the lines before it stay written.
"""

import json
import sys
from typing import TYPE_CHECKING

from megatron_vrl.process.command_line import OverrideParser, protocol_name, tool_parser
from megatron_vrl.process.entry import run_program

if TYPE_CHECKING:
    from megatron_vrl.evaluation.grading import Grader


def make_parser() -> OverrideParser:
    from megatron_vrl.tasks import TASKS

    parser = tool_parser(__doc__)
    parser.add_argument("--task", required=True, choices=list(TASKS), help="kind of question")
    parser.add_argument(
        "--mode",
        default="strict",
        type=protocol_name,
        choices=["strict", "answer_only", "temporal_r1"],
        help="how answers are parsed (default: strict)",
    )
    parser.add_overrides()
    return parser


def main() -> None:
    arguments = make_parser().parse_intermixed_args()
    from megatron_vrl.config import Rewards, Section
    from megatron_vrl.config.loader import validate_with_overrides
    from megatron_vrl.evaluation.grading import Grader
    from megatron_vrl.rewards.weights import reward_weights

    class GradeConfig(Section):
        rewards: Rewards = Rewards()

    rewards = validate_with_overrides(GradeConfig, {}, arguments.overrides, "command line").rewards
    weights = reward_weights(rewards)[arguments.task]
    _grade_all(Grader(task=arguments.task, mode=arguments.mode, weights=weights))


def _grade_all(grader: "Grader") -> None:
    """Write the score of every line of stdin to stdout."""
    from megatron_vrl.errors import DataError

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
