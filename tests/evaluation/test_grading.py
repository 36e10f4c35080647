"""Stored responses graded line by line: fields in and out, both modes, and what a bad line does."""

import json
import math
import re
import subprocess
import sys
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.errors import DataError
from megatron_vrl.evaluation.grading import Grader
from megatron_vrl.tasks import TASKS
from tests.running import ENVIRONMENT, ROOT

GROUNDING = {"id": "a", "duration_s": 30.0, "intervals_s": [[6.0, 15.0]]}
RIGHT = '<think>x</think><answer>{"start_time": "6.0", "end_time": "15.0"}</answer>'
BLOCK = re.compile("<answer>(.*?)</answer>", re.S)
SEED_FORM = re.compile(
    r'<think>.*?</think>\s*<answer>\s*\{\s*"start_time"\s*:\s*"([\d.]+)"\s*,\s*"end_time"\s*:\s*'
    r'"([\d.]+)"\s*\}\s*</answer>',
    re.S,
)


def grade(
    fields: dict[str, Any] | list[Any],
    task: str = "temporal_grounding",
    mode: Literal["strict", "temporal_r1"] = "strict",
) -> dict[str, Any]:
    return Grader(task=task, mode=mode, weights=TASKS[task].default_weights).grade(fields)


def released_score(response: str, duration_s: float, truth_s: tuple[float, float]) -> float:
    """The released score in other words: hull IoU of the normalised times and the full match."""
    try:
        block = BLOCK.search(response)
        assert block is not None  # caught below, as any other failure
        answer = json.loads(block.group(1).strip())
        p = [float(answer[key]) / duration_s for key in ("start_time", "end_time")]
        g = [time / duration_s for time in truth_s]
        ordered = (max(p[0], g[0]), min(p[0], g[0]), max(p[1], g[1]), min(p[1], g[1]))
        iou = max(0, max(ordered[3] - ordered[0], 0) / (ordered[2] - ordered[1]))
    except Exception:
        iou = 0.0
    return 0.5 * iou + 0.5 * (1.0 if SEED_FORM.fullmatch(response) else 0.0)


values = st.one_of(
    st.floats(-50, 200).map(lambda t: f'"{t:.3f}"'),
    st.sampled_from(['"6.0"', '"15.0"', "6", "null", '"nan"', '"inf"', "NaN", '"1.2.3"', '"6 s"']),
)


@given(
    values,
    values,
    st.sampled_from(["{}", " {}", "{}\n", "<answer>{{}}</answer>{}", "{0}{0}", "<think>{}"]),
    st.booleans(),
)
def test_seed_mode_is_the_released_score_bit_for_bit(
    start: str, end: str, around: str, swapped: bool
) -> None:
    pairs = [f'"start_time": {start}', f'"end_time": {end}']
    body = ", ".join(reversed(pairs) if swapped else pairs)
    response = around.format(f"<think>x</think><answer>{{{body}}}</answer>")
    row = grade(GROUNDING | {"response": response}, mode="temporal_r1")
    assert row["score"] == released_score(response, 30.0, (6.0, 15.0))
    json.dumps(row, allow_nan=False)


def test_a_row_says_what_was_read() -> None:
    assert grade(GROUNDING | {"response": RIGHT, "source": "passed over"}) == {
        "id": "a",
        "score": 1.0,
        "parts": {"format": 1.0, "temporal_iou": 1.0},
        "parsed": {"interval_s": [6.0, 15.0]},
        "failure": None,
    }
    past_the_end = RIGHT.replace("15.0", "9999")
    mode: Literal["strict", "temporal_r1"]
    for mode, read in (("strict", [6.0, 30.0]), ("temporal_r1", [6.0, 9999.0])):
        row = grade(GROUNDING | {"response": past_the_end}, mode=mode)
        assert row["parsed"] == {"interval_s": read}


@pytest.mark.parametrize("mode", ["strict", "temporal_r1"])
def test_a_failure_is_told_from_a_wrong_answer(mode: Literal["strict", "temporal_r1"]) -> None:
    wrong = grade(GROUNDING | {"response": RIGHT.replace('"6.0"', '"20"').replace("15", "25")})
    assert (wrong["parts"]["temporal_iou"], wrong["failure"]) == (0.0, None)
    unreadable = grade(GROUNDING | {"response": "from 6 to 15"}, mode=mode)
    assert unreadable["score"] == 0.0 and unreadable["parsed"] == {"interval_s": None}
    assert "<answer>" in unreadable["failure"]
    infinite = grade(GROUNDING | {"response": RIGHT.replace("15.0", "inf")}, mode=mode)
    assert infinite["failure"] and infinite["score"] == 0.0


HOLES = [  # what strict mode closes: response, format, IoU
    (RIGHT.replace("x", RIGHT.replace("<think>x</think>", "")), 0, 1),  # an extra, hidden block
    (
        RIGHT + RIGHT.replace("<think>x</think>", "").replace("6.0", "20").replace("15.0", "30"),
        0,
        0,
    ),
    (RIGHT.replace("6.0", "15.0", 1).replace('end_time": "15.0', 'end_time": "6.0'), 0, 0),
    (RIGHT.replace("6.0", "6.0 s"), 0, 0),
    (RIGHT.replace('"6.0"', "NaN"), 0, 0),
    (RIGHT.replace("15.0", "Infinity"), 0, 0),
    (RIGHT.replace("15.0", "1e1"), 0, 0),
    (RIGHT.replace("</answer>", ""), 0, 0),
    (RIGHT.replace("15.0", "15.0\uff11"), 0, 0),  # a full-width digit
]


@pytest.mark.parametrize(("response", "form", "iou"), HOLES)
def test_strict_mode_closes_the_holes(response: str, form: int, iou: int) -> None:
    assert grade(GROUNDING | {"response": response})["parts"] == {
        "format": form,
        "temporal_iou": iou,
    }


@pytest.mark.parametrize("option", ["B", "b", "(B)"])
@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"option": "B"}', 1),
        ("(b)", 1),
        ('{"option": "B. small dog"}', 1),
        ("(B) small dog", 1),
        ('{"option": "D. small dog"}', 0),
        ('{"option": "B small dog"}', 0),  # the letter is not marked: "A dog" names nothing
        ('{"option": "A"}', 0),
        ('{"option": "A or B"}', 0),
    ],
)
def test_an_option_needs_no_texts(option: str, answer: str, right: int) -> None:
    response = f"<think></think><answer>{answer}</answer>"
    row = grade({"id": 7, "response": response, "option": option}, task="multiple_choice")
    assert row["id"] == 7 and row["parts"]["accuracy"] == right


def test_an_option_by_its_text() -> None:
    fields = {"id": "a", "option": "B", "options": ["red", "blue"]}
    response = '<think></think><answer>{"option": "blue"}</answer>'
    row = grade(fields | {"response": response}, task="multiple_choice")
    assert row["parsed"] == {"option": "B"} and row["parts"]["accuracy"] == 1.0


def test_grounded_qa_takes_the_best_of_several_intervals() -> None:
    body = '{"option": "C", "start_time": "20", "end_time": "25"}'
    fields = GROUNDING | {
        "intervals_s": [[6.0, 15.0], [20.0, 25.0]],
        "option": "C",
        "response": f"<think></think><answer>{body}</answer>",
    }
    row = grade(fields, task="grounded_qa")
    assert row["score"] == 1.0
    assert row["parsed"] == {"interval_s": [20.0, 25.0], "option": "C"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([], "holds list, expected an object"),
        ({"response": RIGHT}, "field 'id' is missing"),
        (GROUNDING, "field 'response' is missing"),
        (GROUNDING | {"response": 5}, "field 'response' is 5, refused"),
        ({"id": "a", "response": "", "duration_s": 9.0}, "field 'intervals_s' is missing, which"),
        (GROUNDING | {"response": "", "duration_s": 0}, "field 'duration_s' is 0, refused"),
        (GROUNDING | {"response": "", "duration_s": math.nan}, "field 'duration_s' is nan, ref"),
        (GROUNDING | {"response": "", "intervals_s": [[5]]}, "field 'intervals_s.0' is [5], ref"),
        (GROUNDING | {"response": "", "intervals_s": [[5, 5]]}, "expected a start before an end"),
        (GROUNDING | {"response": "", "intervals_s": [[31, 40]]}, "within the 30 s of the video"),
    ],
)
def test_a_line_that_cannot_be_graded_is_named(
    fields: dict[str, Any] | list[Any], sentence: str
) -> None:
    with pytest.raises(DataError) as error:
        grade(fields)
    assert sentence in str(error.value)


def run(text: str | bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/grade.py"), *arguments],
        input=text.encode() if isinstance(text, str) else text,
        env=ENVIRONMENT,
        capture_output=True,
    )


def test_the_tool_writes_what_precedes_a_bad_line() -> None:
    good = json.dumps(GROUNDING | {"response": RIGHT})
    lines = f"{good}\n\n{good}\n{{bad\n{good}\n"
    done = run(lines, "--task", "temporal_grounding", "--mode=temporal_r1")
    assert done.returncode == 2
    assert [json.loads(line)["score"] for line in done.stdout.splitlines()] == [1.0, 1.0]
    (sentence,) = done.stderr.decode().splitlines()
    assert sentence.startswith("error: line 4 is not JSON (Expecting property name")


def test_the_tool_weighs_as_told_and_knows_its_tasks() -> None:
    line = json.dumps(GROUNDING | {"response": " " + RIGHT, "id": "\ud800"})
    weights = "rewards.weights.temporal_grounding={format: 0, temporal_iou: 0.25}"
    done = run(line, "--task", "temporal_grounding", weights)
    assert json.loads(done.stdout)["score"] == 0.25 and done.returncode == 0
    assert run(line, "--task", "grounding").returncode == 2
    done = run(b'{"id": "\xff"}', "--task", "temporal_grounding")
    assert done.returncode == 2 and done.stderr.startswith(b"error: line 1 is not JSON")
