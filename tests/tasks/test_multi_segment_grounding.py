"""Answers that are sets of intervals: parser, rewards, metrics, and data in this form."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Rewards, Source
from megatron_vrl.data.formats.training import read
from megatron_vrl.errors import DataError
from megatron_vrl.evaluation.grading import Grader
from megatron_vrl.evaluation.metrics import summarise
from megatron_vrl.rewards.interval_sets import merge, set_iou
from megatron_vrl.rewards.score import score
from megatron_vrl.tasks import TASKS, can_be_asked
from megatron_vrl.tasks.answer import MAX_INTERVALS
from megatron_vrl.types import Interval, Sample, VideoClip

TASK = TASKS["multi_segment_grounding"]
SAMPLE = Sample(
    id="v/0",
    task=TASK.name,
    media=(VideoClip("v.mp4"),),
    duration_s=30.0,
    query="the door opens",
    rationale="it opens twice",
    intervals_s=((20.0, 24.0), (6.0, 10.0)),
    options=(),
    option="",
)
WEIGHTS = dict.fromkeys((*TASK.components, *TASK.optional_components), 1.0)
RIGHT = "[[6.0, 10.0], [20.0, 24.0]]"


def answer(pairs: Any) -> str:
    return f'<think>x</think><answer>{{"intervals": {pairs}}}</answer>'


def test_exact_texts() -> None:
    assert TASK.question(SAMPLE) == (
        'Give the query: "the door opens", when does the described content occur in the video? '
        'Name every interval, in seconds: {"intervals": [[start, end], ...]}.'
    )
    assert TASK.target(SAMPLE) == (
        '<think>it opens twice</think><answer>{"intervals": [[6.0, 10.0], [20.0, 24.0]]}</answer>'
    )
    short = replace(SAMPLE, intervals_s=((6.01, 6.04), (7.0, 8.04), (8.0, 9.0)))
    assert '"intervals": [[7.0, 9.0]]' in TASK.target(short)


@pytest.mark.parametrize(
    ("pairs", "intervals_s", "formatted"),
    [
        (RIGHT, ((6.0, 10.0), (20.0, 24.0)), True),
        ("[ [6,10] ,[20 , 24]\n]", ((6.0, 10.0), (20.0, 24.0)), True),
        ("[[20, 24], [6, 10]]", ((6.0, 10.0), (20.0, 24.0)), True),  # any order
        ("[[6, 10], [8, 12]]", ((6.0, 10.0), (8.0, 12.0)), True),  # overlap
        ("[[6, 99]]", ((6.0, 30.0),), True),  # clipped to the video
        ("[[-6, 10]]", ((0.0, 10.0),), False),
        ('[["6.0", "10.0"]]', ((6.0, 10.0),), False),  # text is read, but is not the form
    ],
)
def test_readable_sets(pairs: str, intervals_s: tuple[Interval, ...], formatted: bool) -> None:
    parsed = TASK.parse(answer(pairs), SAMPLE)
    assert (parsed.intervals_s, parsed.formatted, parsed.failure) == (intervals_s, formatted, "")
    assert parsed.interval_s is None and parsed.shown_intervals_s == intervals_s


@pytest.mark.parametrize(
    ("pairs", "failure"),
    [
        ("[]", "intervals [] is not a list of [start, end]"),
        ("null", "intervals None is not a list of [start, end]"),
        ('"6.0 - 10.0"', "intervals '6.0 - 10.0' is not a list of [start, end]"),
        ("[6.0, 10.0]", "6.0 is not [start, end]"),
        ("[[6.0, 10.0, 12.0]]", "[6.0, 10.0, 12.0] is not [start, end]"),
        ("[[6.0, 10.0], []]", "[] is not [start, end]"),
        ("[[6.0, 10.0], [24.0, 20.0]]", "no part of the video lies between 24 s and 20 s"),
        ("[[6.0, 10.0], [31.0, 40.0]]", "no part of the video lies between 30 s and 30 s"),
        ('[[6.0, "0:10"]]', "end '0:10' is not a number of seconds"),
        ("[[1e1, 20.0]]", "start '1e1' is not a number of seconds"),
        ("[[true, 20.0]]", "start True is not a number of seconds"),
        ("[[NaN, 20.0]]", "the answer is not JSON"),
        ("[[6.0, 10.0]", "the answer is not JSON"),
        (str([[6.0, 10.0]] * (MAX_INTERVALS + 1)), "the answer has 101 intervals, more than 100"),
    ],
)
def test_unreadable_sets(pairs: str, failure: str) -> None:
    parsed = TASK.parse(answer(pairs), SAMPLE)
    assert (parsed.intervals_s, parsed.formatted, parsed.failure) == ((), False, failure)


def test_the_form_of_one_interval_is_not_read_as_a_set() -> None:
    one = '<think>x</think><answer>{"start_time": "6.0", "end_time": "10.0"}</answer>'
    assert TASK.parse(one, SAMPLE).failure == "intervals None is not a list of [start, end]"
    single = replace(SAMPLE, task="temporal_grounding")
    assert TASKS["temporal_grounding"].parse(answer(RIGHT), single).failure != ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_read_or_refused_with_a_reason(value: Any) -> None:
    for body in (json.dumps(value), json.dumps([value, [1.0, 2.0]])):
        parsed = TASK.parse(answer(body), SAMPLE)
        assert bool(parsed.failure) == (not parsed.intervals_s)
        assert not (parsed.formatted and parsed.failure)
        assert list(parsed.intervals_s) == sorted(parsed.intervals_s)
        assert all(0 <= start_s < end_s <= 30.0 for start_s, end_s in parsed.intervals_s)
        components, _ = score(SAMPLE, answer(body), "strict", WEIGHTS)
        assert all(0.0 <= value <= 1.0 for value in components.values())


tenths = st.integers(0, 300).map(lambda n: n / 10)
intervals = st.tuples(tenths, tenths).filter(lambda i: i[0] < i[1])


@given(st.lists(intervals, min_size=1, max_size=6), st.randoms())
def test_a_written_set_is_read_back_and_its_truth_scores_1(
    spans: Sequence[Interval], random: Any
) -> None:
    parsed = TASK.parse(answer([list(span) for span in spans]), SAMPLE)
    assert parsed.formatted and list(parsed.intervals_s) == sorted(spans)
    sample = replace(SAMPLE, intervals_s=tuple(spans))
    components, _ = score(sample, TASK.target(sample), "strict", WEIGHTS)
    assert components == dict.fromkeys(WEIGHTS, 1.0)
    shuffled = random.sample(list(spans), len(spans))  # the order of truths is no information
    assert TASK.target(replace(sample, intervals_s=tuple(shuffled))) == TASK.target(sample)


@pytest.mark.parametrize(
    ("pairs", "set_iou", "f1", "matched"),
    [
        (RIGHT, 1.0, 1.0, 1.0),
        # half of the truth; the second true interval has no partner
        ("[[6, 10]]", 0.5, 2 * 4 / 12, 1 / 2),
        # the whole video: 8 of 30 s; GIoU with the first: IoU 4 / 30, no gap
        ("[[0, 30]]", 8 / 30, 2 * 8 / 38, (1 + 4 / 30) / 2 / 2),
        # one piece of each: intersection 4 s of 8 s; IoU 1/2, no gap, twice
        ("[[6, 8], [22, 24]]", 0.5, 2 * 4 / 12, (1 + 0.5) / 2),
        # two fragments of the first: the union is right there, the pairs are not:
        # [6, 8] with [6, 10] has IoU 1/2; [8, 10] with [20, 24] has a gap of 10 s in 16 s
        ("[[6, 8], [8, 10]]", 0.5, 2 * 4 / 12, ((1 + 0.5) / 2 + (1 - 10 / 16) / 2) / 2),
        ("[[12, 16]]", 0.0, 0.0, (1 - 2 / 10) / 2 / 2),
    ],
)
def test_rewards_by_their_formulas(pairs: str, set_iou: float, f1: float, matched: float) -> None:
    components, _ = score(SAMPLE, answer(pairs), "strict", WEIGHTS)
    assert components["temporal_iou"] == pytest.approx(set_iou, abs=1e-12)
    assert components["segment_f1"] == pytest.approx(f1, abs=1e-12)
    assert components["matched_giou"] == pytest.approx(matched, abs=1e-12)


def test_metrics_and_baselines() -> None:
    responses = [answer(RIGHT), answer("[[6, 10]]"), answer("[[6, 8], [8, 10]]"), "nothing"]
    found = summarise([SAMPLE] * 4, responses, Rewards())
    values = {name: found[f"{TASK.name}/{name}"] for name in TASK.titles}
    assert values["miou"] == pytest.approx(np.mean([1, 0.5, 0.5, 0]))
    assert (values["iou@0.3"], values["iou@0.5"], values["iou@0.7"]) == (0.75, 0.75, 0.25)
    assert values["f1"] == pytest.approx(np.mean([1, 2 / 3, 2 / 3, 0]))
    assert values["count_accuracy"] == 0.25  # two touching fragments are one interval
    samples = [SAMPLE, replace(SAMPLE, duration_s=60.0, intervals_s=((3.0, 9.0), (6.0, 30.0)))]
    best = TASK.baselines(samples)["best constant"]
    constant = summarise(samples, best, Rewards())[f"{TASK.name}/miou"]
    truths = [merge(sample.intervals_s) for sample in samples]
    grid = [(a / 40, b / 40) for a in range(41) for b in range(a + 1, 41)]
    wanted = max(
        np.mean(
            [
                set_iou(((a * s.duration_s, b * s.duration_s),), truth)
                for s, truth in zip(samples, truths, strict=True)
            ]
        )
        for a, b in grid
    )
    assert constant == pytest.approx(wanted, abs=0.01)  # the answer is written to 0.1 s


def test_a_stored_response_is_graded_as_a_set() -> None:
    row = {"id": "a", "response": answer(RIGHT), "duration_s": 30.0, "intervals_s": [[6, 10]]}
    graded = Grader(task=TASK.name, mode="strict", weights=TASK.default_weights).grade(row)
    assert graded["parsed"] == {"intervals_s": [[6.0, 10.0], [20.0, 24.0]]}
    assert graded["parts"] == {"format": 1.0, "temporal_iou": 0.5}


def test_a_source_asks_in_this_form(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    record = {"duration": 30.0, "timestamps": [[6.0, 10.0]], "sentences": ["the door opens"]}
    path.write_text(json.dumps({"v": record}))
    source = Source(json_path=str(path), data_folder="/clips", format="charades_sta")
    (one,) = read(source)
    (as_set,) = read(source.model_copy(update={"multi_segment": True}))
    assert one.task == "temporal_grounding" and as_set == replace(one, task=TASK.name)


def test_the_generic_format_has_several_truths(tmp_path: Path) -> None:
    path = tmp_path / "segments.json"
    source = Source(json_path=str(path), data_folder="/clips", format="generic")
    record = {"id": "v/0", "video": "v.mp4", "duration": 30.0, "question": "the door opens"}
    record |= {"task": TASK.name, "intervals": [[6.0, 10.0], [20.0, 40.0]], "clip": [2.0, 30.0]}
    path.write_text(json.dumps([record]))
    (sample,) = read(source)
    assert can_be_asked(sample) and sample.duration_s == 28.0
    assert sample.intervals_s == ((4.0, 8.0), (18.0, 28.0))
    path.write_text(json.dumps([record | {"task": "multiple_choice"}]))
    with pytest.raises(DataError, match=r"'multiple_choice', expected a task whose truth is field"):
        read(source)
    path.write_text(json.dumps([record | {"intervals": None}]))
    with pytest.raises(DataError, match="expected a task with a truth of its own"):
        read(source)
