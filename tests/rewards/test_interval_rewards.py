"""Rewards of intervals: golden values worked by hand, and what must hold for any interval."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.rewards import diou, giou, temporal_wasserstein
from megatron_vrl.rewards.interval_sets import length, merge, overlap, set_iou
from megatron_vrl.rewards.temporal_wasserstein import reward, wasserstein
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Interval, Parsed, Sample, VideoClip

SAMPLE = Sample(
    id="v/0",
    task="temporal_grounding",
    media=(VideoClip("v.mp4"),),
    duration_s=60.0,
    query="the door opens",
    rationale="",
    intervals_s=((6.0, 15.0),),
    options=(),
    option="",
)
MISS_REWARDS = ("temporal_wasserstein", "giou", "diou")

times = st.integers(0, 1000).map(float)
intervals = st.tuples(times, times).filter(lambda i: i[0] < i[1])
sets = st.lists(intervals, min_size=1, max_size=4).map(merge)


@pytest.mark.parametrize(
    ("answer_s", "w1_s"),
    [
        ((6.0, 15.0), 0.0),
        ((15.0, 24.0), 9.0),  # each point moves 9 s
        ((6.0, 24.0), 4.5),  # all mass lies to the right: difference of the means, 15 - 10.5
        ((9.0, 12.0), 1.5),  # mean of |6 + 9 u - (9 + 3 u)| over u in [0, 1]
        ((0.0, 1.0), 10.0),
    ],
)
def test_wasserstein_of_one_interval(answer_s: Interval, w1_s: float) -> None:
    """The reward is exp(-W1 / 9 s): the truth is 9 s long."""
    assert wasserstein((answer_s,), SAMPLE.intervals_s) == pytest.approx(w1_s, abs=1e-12)
    value = temporal_wasserstein.score(SAMPLE, Parsed(interval_s=answer_s))
    assert value == pytest.approx(math.exp(-w1_s / 9.0), abs=1e-12)


def test_wasserstein_of_sets() -> None:
    """Truth [0, 2] + [4, 6], answer [0, 6]: the distribution functions differ by 1/6 at 2 s and by
    -1/6 at 4 s, and by a mean of 1/12 everywhere: W1 = 6 / 12 s."""
    truth: tuple[Interval, ...] = ((0.0, 2.0), (4.0, 6.0))
    assert wasserstein(((0.0, 6.0),), truth) == pytest.approx(0.5, abs=1e-12)
    assert reward(((0.0, 6.0),), truth) == pytest.approx(math.exp(-0.5 / 4.0), abs=1e-12)
    fragments = merge([(0.0, 1.0), (1.0, 3.0), (2.0, 6.0)])  # the paper: fragments change nothing
    assert reward(fragments, truth) == reward(((0.0, 6.0),), truth)


@pytest.mark.parametrize(
    ("answer_s", "scaled_giou", "scaled_diou"),
    [
        ((6.0, 15.0), 1.0, 1.0),
        # IoU 1/2, hull 18, union 18; centres 15 and 10.5
        ((6.0, 24.0), (0.5 + 1.0) / 2, (1 + 0.5 - (4.5 / 18) ** 2) / 2),
        # hull 9 from 6 to 15, union 9, IoU 1/3; equal centres
        ((9.0, 12.0), (1 / 3 + 1.0) / 2, (1 + 1 / 3) / 2),
        # IoU 0, hull 24 from 6 to 30, union 9 + 6; centres 27 and 10.5
        ((24.0, 30.0), (15 / 24) / 2, (1 - (16.5 / 24) ** 2) / 2),
    ],
)
def test_giou_and_diou_by_their_formulas(
    answer_s: Interval, scaled_giou: float, scaled_diou: float
) -> None:
    parsed = Parsed(interval_s=answer_s)
    assert giou.score(SAMPLE, parsed) == pytest.approx(scaled_giou, abs=1e-12)
    assert diou.score(SAMPLE, parsed) == pytest.approx(scaled_diou, abs=1e-12)


def test_union_and_overlap_of_sets() -> None:
    left = merge([(4.0, 6.0), (0.0, 2.0), (2.0, 3.0), (5.0, 8.0)])
    right = ((1.0, 5.0), (7.0, 9.0))
    assert left == ((0.0, 3.0), (4.0, 8.0))
    assert length(left) == 7.0 and overlap(left, right) == 4.0
    assert set_iou(left, right) == pytest.approx(4.0 / 9.0)


@given(intervals, intervals)
def test_values_are_in_range_and_1_at_equality(answer_s: Interval, truth_s: Interval) -> None:
    task = TASKS["temporal_grounding"]
    sample = replace(SAMPLE, duration_s=1000.0, intervals_s=(truth_s,))
    for name in MISS_REWARDS:
        component = task.optional_components[name]
        assert 0.0 <= component(sample, Parsed(interval_s=answer_s)) <= 1.0
        assert component(sample, Parsed(interval_s=truth_s)) == 1.0
        assert component(sample, Parsed(failure="nothing was read")) == 0.0


@given(sets, sets)
def test_distances_of_sets_are_symmetric(
    left: tuple[Interval, ...], right: tuple[Interval, ...]
) -> None:
    assert wasserstein(left, right) == wasserstein(right, left)
    assert giou.scaled_giou(left[0], right[0]) == giou.scaled_giou(right[0], left[0])
    assert diou.scaled_diou(left[0], right[0]) == diou.scaled_diou(right[0], left[0])
    assert set_iou(left, right) == set_iou(right, left)
    assert set_iou(left, left) == reward(left, left) == 1.0
    assert 0.0 <= set_iou(left, right) <= 1.0
    means = [sum(e * e - s * s for s, e in one) / 2 / length(one) for one in (left, right)]
    assert wasserstein(left, right) >= abs(means[0] - means[1]) - 1e-9  # Jensen's inequality


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 200), st.integers(1, 200))
def test_of_two_misses_the_nearer_scores_more(
    truth_length: int, answer_length: int, gap: int, further: int
) -> None:
    sample = replace(SAMPLE, duration_s=1000.0, intervals_s=((0.0, float(truth_length)),))

    def value(name: str, begins: int) -> float:
        start_s = float(truth_length + begins)
        parsed = Parsed(interval_s=(start_s, start_s + answer_length))
        assert TASKS["temporal_grounding"].components["temporal_iou"](sample, parsed) == 0.0
        return TASKS["temporal_grounding"].optional_components[name](sample, parsed)

    for name in MISS_REWARDS:
        assert value(name, gap) > value(name, gap + further) >= 0.0


def test_the_nearest_of_several_truths_counts() -> None:
    several = replace(SAMPLE, intervals_s=((6.0, 15.0), (40.0, 50.0)))
    parsed = Parsed(interval_s=(30.0, 39.0))
    for name in MISS_REWARDS:
        component = TASKS["grounded_qa"].optional_components[name]
        nearest = component(replace(SAMPLE, intervals_s=((40.0, 50.0),)), parsed)
        assert component(several, parsed) == nearest > component(SAMPLE, parsed)
