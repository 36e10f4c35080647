"""Evaluation numbers against counts by hand and a brute-force search."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from megatron_vrl.config import Rewards
from megatron_vrl.evaluation.metrics import summarise
from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.tasks.baselines import (
    GRID_STEPS,
    best_constant_interval,
    best_constant_letter,
    constant_interval_miou,
)
from megatron_vrl.types import Sample, VideoClip

SAMPLE = Sample(
    id="v/0",
    task="temporal_grounding",
    media=(VideoClip("v.mp4"),),
    duration_s=10.0,
    query="q",
    rationale="",
    intervals_s=((0.0, 5.0),),
    options=("red", "blue"),
    option="B",
)


def times(start_s: float, end_s: float) -> str:
    body = f'{{"start_time": "{start_s}", "end_time": "{end_s}"}}'
    return f"<think></think><answer>{body}</answer>"


def choice(letter: str) -> str:
    return f'<think></think><answer>{{"option": "{letter}"}}</answer>'


def test_grounding_numbers() -> None:
    responses = [times(0, 5), times(0, 10), times(0, 1.5), times(6, 9), "no answer"]
    summary = summarise([SAMPLE] * 5, responses, Rewards())
    ious = [1.0, 0.5, 0.3, 0.0, 0.0]
    assert summary["temporal_grounding/miou"] == pytest.approx(np.mean(ious))
    assert summary["temporal_grounding/r1@0.3"] == pytest.approx(3 / 5)  # at the threshold counts
    assert summary["temporal_grounding/r1@0.5"] == pytest.approx(2 / 5)
    assert summary["temporal_grounding/r1@0.7"] == pytest.approx(1 / 5)
    assert summary["temporal_grounding/failure_rate"] == summary["failure_rate"] == 1 / 5
    assert summary["format_rate"] == 4 / 5
    assert summary["reward/mean"] == pytest.approx(0.5 * 4 / 5 + 0.5 * np.mean(ious))
    assert summary["num_samples"] == 5
    assert not any(key.startswith("multiple_choice") for key in summary)


def test_a_mixed_split_reports_each_task() -> None:
    mc = replace(SAMPLE, task="multiple_choice")
    samples = [SAMPLE, mc, mc, replace(mc, option="A"), mc]
    responses = [times(0, 5), choice("B"), choice("A"), choice("B"), choice("A or B")]
    summary = summarise(samples, responses, Rewards())
    assert summary["temporal_grounding/miou"] == 1.0
    assert summary["multiple_choice/accuracy"] == 1 / 4
    assert summary["multiple_choice/failure_rate"] == 1 / 4
    assert summary["multiple_choice/num_samples"] == 4
    assert summary["num_samples"] == 5
    assert all(isinstance(value, float) for value in summary.values())


def test_grounded_question_answering_joins_option_and_span() -> None:
    sample = replace(SAMPLE, task="grounded_qa", intervals_s=((0.0, 2.0), (4.0, 8.0)))

    def both(letter: str, start_s: int, end_s: float) -> str:
        fields = f'"option": "{letter}", "start_time": "{start_s}", "end_time": "{end_s}"'
        return f"<think></think><answer>{{{fields}}}</answer>"

    responses = [both("B", 4, 8), both("B", 2, 6), both("B", 1, 3.5), both("A", 4, 6), choice("B")]
    summary = summarise([sample] * 5, responses, Rewards())
    assert summary["grounded_qa/accuracy"] == 4 / 5
    assert summary["grounded_qa/miop"] == pytest.approx(np.mean([1, 0.5, 0.4, 1, 0]))
    assert summary["grounded_qa/accuracy_gqa"] == 2 / 5
    assert summary["grounded_qa/miou"] == pytest.approx(np.mean([1, 1 / 3, 1 / 3.5, 0.5, 0]))


def test_the_best_constant_interval_is_that_of_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(20):
        starts = rng.uniform(0, 20, size=rng.integers(1, 4))
        spans = tuple((float(s), float(s + rng.uniform(1, 10))) for s in starts)
        samples.append(replace(SAMPLE, duration_s=float(rng.uniform(30, 60)), intervals_s=spans))

    def plain(start: float | np.float64, end: float | np.float64) -> float:
        values = []
        for sample in samples:
            answered = (start * sample.duration_s, end * sample.duration_s)
            values.append(max(iou(answered, truth) for truth in sample.intervals_s))
        return float(np.mean(values))

    grid = np.linspace(0, 1, GRID_STEPS + 1)
    best, miou = best_constant_interval(samples)
    assert miou == pytest.approx(max(plain(s, e) for s, e in combinations(grid, 2)))
    assert plain(*best) == pytest.approx(miou)
    assert miou >= constant_interval_miou(samples, (0.0, 1.0)) == pytest.approx(plain(0.0, 1.0))


def test_the_best_letter_is_the_first_of_equals() -> None:
    samples = [replace(SAMPLE, option=letter) for letter in "CBBCA"]
    assert best_constant_letter(samples) == ("B", 2 / 5)


def test_one_response_for_each_sample() -> None:
    with pytest.raises(ValueError, match="2 samples and 1 responses"):
        summarise([SAMPLE, SAMPLE], ["x"], Rewards())
