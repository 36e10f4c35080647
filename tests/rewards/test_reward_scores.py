"""Scores: the released golden vectors, the strict ones beside them, and what must always hold."""

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Rewards
from megatron_vrl.errors import ConfigError
from megatron_vrl.rewards.score import score
from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.short_answer import ShortAnswer
from megatron_vrl.types import Sample, VideoClip

SAMPLE = Sample(
    id="v/0",
    task="temporal_grounding",
    media=(VideoClip("v.mp4"),),
    duration_s=30.0,
    query="the door opens",
    rationale="",
    intervals_s=((6.0, 15.0),),
    options=("red", "blue", "green"),
    option="B",
    truth=ShortAnswer(answer="blue"),
)
HALF = {"format": 0.5, "temporal_iou": 0.5}
RIGHT = '<think>x</think><answer>{"start_time": "6.0", "end_time": "15.0"}</answer>'


def answer(start: str, end: str) -> str:
    return f'<think>x</think><answer>{{"start_time": {start}, "end_time": {end}}}</answer>'


HIDDEN = RIGHT.replace("x", '<answer>{"start_time": "6", "end_time": "15"}</answer>').replace(
    '"6.0", "end_time": "15.0"', '"20.0", "end_time": "30.0"'
)
GOLDEN = [  # name, response, released (IoU, format), strict (IoU, format)
    ("right", RIGHT, (1, 1), (1, 1)),
    ("newline after", RIGHT + "\n", (1, 0), (1, 1)),
    ("space before", " " + RIGHT, (1, 0), (1, 1)),
    ("bare numbers", answer("6.0", "15.0"), (1, 0), (1, 0)),
    (
        "keys reversed",
        '<think>x</think><answer>{"end_time": "15.0", "start_time": "6.0"}</answer>',
        (1, 0),
        (1, 0),
    ),
    ("no think block", RIGHT.removeprefix("<think>x</think>"), (1, 0), (1, 0)),
    ("swapped", answer('"15.0"', '"6.0"'), (0, 1), (0, 0)),
    ("start is end", answer('"6.0"', '"6.0"'), (0, 1), (0, 0)),
    ("hidden in the thinking", HIDDEN, (1, 1), (0, 0)),
    ("dots", answer('"1.2.3"', '"..."'), (0, 1), (0, 0)),
    ("units", answer('"6.0s"', '"15.0s"'), (0, 0), (0, 0)),
    ("mm:ss", answer('"00:06"', '"00:15"'), (0, 0), (0, 0)),
    (
        "code fence",
        '<think>x</think><answer>```json\n{"start_time": "6.0", "end_time": "15.0"}\n```</answer>',
        (0, 0),
        (0, 0),
    ),
    ("list", "<think>x</think><answer>[6.0, 15.0]</answer>", (0, 0), (0, 0)),
    ("string", '<think>x</think><answer>"6.0 - 15.0"</answer>', (0, 0), (0, 0)),
    ("missing key", '<think>x</think><answer>{"start_time": "6.0"}</answer>', (0, 0), (0, 0)),
    ("null", answer("null", "null"), (0, 0), (0, 0)),
    ("NaN", answer("NaN", "NaN"), (0, 0), (0, 0)),
    ("NaN start", answer('"nan"', '"15.0"'), (0, 0), (0, 0)),
    ("NaN end", answer('"6.0"', '"nan"'), (0, 0), (0, 0)),
    ("inf", answer('"6.0"', '"inf"'), (0, 0), (0, 0)),
    ("both inf", answer('"-inf"', '"inf"'), (0, 0), (0, 0)),
    ("no tag", "from 6.0 to 15.0", (0, 0), (0, 0)),
    ("no JSON", "<think>x</think><answer>6.0 to 15.0</answer>", (0, 0), (0, 0)),
    ("too long an integer", answer("1" + "0" * 400, "15"), (0, 0), (0, 0)),
    ("too deep", f"<think>x</think><answer>{'[' * 100_000}</answer>", (0, 0), (0, 0)),
    ("past the end", answer('"0"', '"9999"'), (9 / 9999, 1), (0.3, 1)),
    ("negative start", answer('"-6"', '"15"'), (9 / 21, 0), (9 / 15, 0)),
    ("whole video", answer('"0"', '"30"'), (0.3, 1), (0.3, 1)),
    ("empty thinking", RIGHT.replace("x", ""), (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("name", "response", "released", "strict"), GOLDEN)
def test_golden_vectors(
    name: str, response: str, released: tuple[float, int], strict: tuple[float, int]
) -> None:
    mode: Literal["strict", "temporal_r1"]
    for mode, (temporal_iou, form) in (("temporal_r1", released), ("strict", strict)):
        components, total = score(SAMPLE, response, mode, HALF)
        assert components["format"] == form
        assert components["temporal_iou"] == pytest.approx(temporal_iou, abs=1e-12)
        assert total == 0.5 * components["format"] + 0.5 * components["temporal_iou"]


ONLY = RIGHT.removeprefix("<think>x</think>")


@pytest.mark.parametrize(
    ("response", "components"),
    [
        (ONLY, (1.0, 1.0)),
        (f"\n{ONLY} ", (1.0, 1.0)),  # white space around is free
        (RIGHT, (0.0, 1.0)),  # a think block is read over, and is not the format
        (f"<think></think>{ONLY}", (0.0, 1.0)),
        (f"</think>{ONLY}", (0.0, 1.0)),
        (f"It is {ONLY}", (0.0, 1.0)),
        (ONLY + ONLY, (0.0, 1.0)),
        (ONLY.replace('"6.0"', "6.0"), (0.0, 1.0)),
        (f"<think>{ONLY}", (0.0, 0.0)),  # never closed
        ("", (0.0, 0.0)),
    ],
)
def test_answer_only_expects_no_think_block(response: str, components: tuple[float, float]) -> None:
    found, total = score(SAMPLE, response, "answer_only", HALF)
    assert (found["format"], found["temporal_iou"]) == components
    assert found["temporal_iou"] == score(SAMPLE, response, "strict", HALF)[0]["temporal_iou"]
    assert total == sum(components) / 2


def test_the_papers_example() -> None:
    assert iou((85.0, 139.5), (75.0, 127.0)) == pytest.approx(0.6512, abs=5e-5)


times = st.floats(0, 1000, allow_nan=False)
intervals = st.tuples(times, times).filter(lambda i: i[1] - i[0] > 1e-3)


@given(intervals, intervals)
def test_iou_is_symmetric_and_in_range(
    left: tuple[float, float], right: tuple[float, float]
) -> None:
    value = iou(left, right)
    assert 0.0 <= value <= 1.0
    assert value == iou(right, left)
    assert iou(left, left) == 1.0
    assert (value == 0.0) == (min(left[1], right[1]) <= max(left[0], right[0]))


@given(intervals, intervals, st.floats(-100, 100), st.floats(0.1, 10))
def test_iou_keeps_under_translation_and_scale(
    left: tuple[float, float], right: tuple[float, float], shift: float, scale: float
) -> None:
    def moved(interval: tuple[float, float]) -> tuple[float, float]:
        return interval[0] * scale + shift, interval[1] * scale + shift

    assert iou(moved(left), moved(right)) == pytest.approx(iou(left, right), abs=1e-6)


@given(intervals, intervals)
def test_released_and_strict_agree_on_ordered_answers_inside_the_video(
    truth: tuple[float, float], predicted: tuple[float, float]
) -> None:
    sample = replace(SAMPLE, duration_s=1000.0, intervals_s=(truth,))
    start, end = (f"{t:.4f}" for t in predicted)
    response = answer(f'"{start}"', f'"{end}"')
    seed, strict = (score(sample, response, mode, HALF)[0] for mode in ("temporal_r1", "strict"))
    if float(start) < float(end):
        assert seed["temporal_iou"] == pytest.approx(strict["temporal_iou"], abs=1e-9)


@given(
    st.text(max_size=80), st.sampled_from(list(TASKS)), st.sampled_from(["strict", "temporal_r1"])
)
def test_every_component_and_total_is_in_range(
    text: str, task: str, mode: Literal["strict", "temporal_r1"]
) -> None:
    sample = replace(SAMPLE, task=task)
    for response in (text, f"<think></think><answer>{text}</answer>", answer(text, text)):
        components, total = score(sample, response, mode, reward_weights(Rewards())[task])
        assert all(0.0 <= value <= 1.0 for value in components.values())
        assert 0.0 <= total <= 1.0


def test_the_best_of_several_intervals_counts() -> None:
    several = replace(SAMPLE, intervals_s=((0.0, 1.0), (6.0, 15.0), (20.0, 30.0)))
    assert score(several, RIGHT, "strict", HALF)[1] == 1.0


def test_grounded_totals_tell_the_halves_apart() -> None:
    sample = replace(SAMPLE, task="grounded_qa")
    weights = {"format": 0.5, "temporal_iou": 0.2, "accuracy": 0.3}

    def total(option: str, start: float, end: float) -> float:
        body = f'{{"option": "{option}", "start_time": "{start}", "end_time": "{end}"}}'
        return score(sample, f"<think></think><answer>{body}</answer>", "strict", weights)[1]

    assert total("B", 6.0, 15.0) == pytest.approx(1.0)
    assert total("B", 20.0, 30.0) == pytest.approx(0.8)
    assert total("A", 6.0, 15.0) == pytest.approx(0.7)
    assert total("A", 20.0, 30.0) == pytest.approx(0.5)


def test_a_component_without_a_weight_is_logged_and_counts_nothing() -> None:
    components, total = score(SAMPLE, RIGHT, "strict", {"temporal_iou": 0.25})
    assert components == {"format": 1.0, "temporal_iou": 1.0} and total == 0.25
    assert score(SAMPLE, RIGHT, "strict", {})[1] == 0.0


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (
            {"temporal_io": 1.0},
            "rewards.weights.temporal_grounding.temporal_io=1.0: the task has no reward component "
            "'temporal_io'; did you mean 'temporal_iou'?",
        ),
        (
            {"accuracy": 1.0},
            "rewards.weights.temporal_grounding.accuracy=1.0: the task has no reward "
            "component 'accuracy'; known: format, temporal_iou, boundary_iou, "
            "temporal_wasserstein, giou, diou, length.",
        ),
        (
            {"format": -0.5},
            "rewards.weights.temporal_grounding.format=-0.5: a weight must be a number >= 0.",
        ),
        (
            {"format": float("nan")},
            "rewards.weights.temporal_grounding.format=nan: a weight must be a number >= 0.",
        ),
    ],
)
def test_weights_are_checked(weights: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        reward_weights(Rewards(weights={"temporal_grounding": weights}))
    assert str(error.value) == sentence


def test_a_component_without_a_given_weight_keeps_its_default() -> None:
    weights = reward_weights(Rewards(weights={"temporal_grounding": {"format": 1.0}}))
    assert weights["temporal_grounding"] == {"format": 1.0, "temporal_iou": 0.5}
    assert weights["multiple_choice"] == TASKS["multiple_choice"].default_weights
    with pytest.raises(ConfigError, match="no such task; did you mean 'temporal_grounding'"):
        reward_weights(Rewards(weights={"temporal_groundin": {"format": 1.0}}))


def test_released_scores_exist_for_grounding_alone() -> None:
    released = [name for name, task in TASKS.items() if task.temporal_r1_components]
    assert released == ["temporal_grounding"]
    sample = replace(SAMPLE, task="multiple_choice")
    response = "<think></think><answer>(b)</answer>"
    modes: tuple[Literal["temporal_r1", "strict"], ...] = ("temporal_r1", "strict")
    seed, strict = (score(sample, response, mode, {"accuracy": 1.0}) for mode in modes)
    assert seed == strict == ({"format": 0.0, "accuracy": 1.0}, 1.0)
