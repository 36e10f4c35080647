"""True intervals at times of temporal steps: TimeLens's rule."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.data.snap_truth import snapped
from megatron_vrl.types import Interval, VideoClip
from tests.data.test_mix import sample
from tests.tiny import video

# Temporal steps at 0, 1 and 2 s.
FRAMES = replace(video((3, 2, 2), 1.0, 0), timestamps_s=np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5]))


@pytest.mark.parametrize(
    ("truth_s", "wanted_s"),
    [
        ((1.0, 2.0), (1.0, 2.0)),
        ((0.6, 1.9), (0.0, 2.0)),
        ((0.99, 1.01), (0.0, 2.0)),
        ((0.25, 1.0), (0.0, 1.0)),
        ((1.1, 9.0), (1.0, 2.0)),  # the last step stands for the rest of the video
        ((2.2, 2.4), (2.2, 2.4)),  # both ends would be at 2.0 s
    ],
)
def test_ends_move_outwards_to_temporal_steps(truth_s: Interval, wanted_s: Interval) -> None:
    several = replace(sample(0), intervals_s=(truth_s, (0.0, 1.0)))
    assert snapped(several, FRAMES) == replace(several, intervals_s=(wanted_s, (0.0, 1.0)))


def test_times_of_a_window_count_from_its_start() -> None:
    shown = replace(FRAMES, timestamps_s=FRAMES.timestamps_s + 10.0)
    shown_part = VideoClip("v.mp4", window_s=(10.0, 13.0))
    of_window = replace(sample(0), intervals_s=((0.6, 1.9),), media=(shown_part,))
    assert snapped(of_window, shown).intervals_s == ((0.0, 2.0),)


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 2)), max_size=4))
def test_snapping_again_changes_nothing(pairs: list[tuple[float, float]]) -> None:
    spans = tuple((start_s, start_s + length_s) for start_s, length_s in pairs)
    once = snapped(replace(sample(0), intervals_s=spans), FRAMES)
    assert snapped(once, FRAMES) == once
    assert all(start_s < end_s for start_s, end_s in once.intervals_s)
