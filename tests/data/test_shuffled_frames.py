"""Prompts with shuffled frames: only pictures move."""

from dataclasses import replace

import numpy as np

from megatron_vrl.data.shuffled_frames import all_shuffled, boundaries_shuffled
from megatron_vrl.types import EncodedVideo, Prompt, VideoClip
from tests.data.test_mix import sample
from tests.tiny import prompt, video

CLIP = video((20, 2, 2), 1.0, seed=0)  # 40 frames, two a second
ASKED = prompt([CLIP], 0)


def order(shuffled: Prompt) -> np.ndarray:
    """Return the new order of the frames, by their indices."""
    (shown,) = shuffled.visuals
    assert isinstance(shown, EncodedVideo)
    assert np.array_equal(shown.frames, CLIP.frames[shown.frame_indices])
    assert np.array_equal(shown.timestamps_s, CLIP.timestamps_s)
    assert np.array_equal(shuffled.token_ids, ASKED.token_ids)
    assert np.array_equal(shuffled.positions, ASKED.positions)
    return shown.frame_indices


def test_all_frames_are_permuted_by_the_seed() -> None:
    found = order(all_shuffled(ASKED, (1, 7)))
    assert sorted(found) == list(range(40)) and not np.array_equal(found, np.arange(40))
    assert np.array_equal(found, order(all_shuffled(ASKED, (1, 7))))
    assert not np.array_equal(found, order(all_shuffled(ASKED, (1, 8))))


def test_frames_within_three_seconds_of_a_boundary_are_permuted() -> None:
    """TaRO shuffles the frames near the start, then those near the end."""
    asked = replace(sample(0), intervals_s=((4.0, 14.0),))
    found = order(boundaries_shuffled(ASKED, asked, (1, 7)))
    for near in (range(2, 15), range(22, 35)):  # 1 s to 7 s and 11 s to 17 s
        assert sorted(found[list(near)]) == list(near)
        assert not np.array_equal(found[list(near)], list(near))
    rest = [0, 1, *range(15, 22), *range(35, 40)]
    assert found[rest].tolist() == rest


def test_times_of_a_window_count_from_its_start() -> None:
    later = prompt([replace(CLIP, timestamps_s=CLIP.timestamps_s + 100.0)], 0)
    shown_part = VideoClip("v.mp4", window_s=(100.0, 120.0))
    asked = replace(sample(0), intervals_s=((4.0, 14.0),), media=(shown_part,))
    (shown,) = boundaries_shuffled(later, asked, (1, 7)).visuals
    assert isinstance(shown, EncodedVideo)
    plain = boundaries_shuffled(ASKED, replace(asked, media=(VideoClip("v.mp4"),)), (1, 7))
    assert np.array_equal(shown.frame_indices, order(plain))


def test_embeddings_of_the_frames_in_order_are_dropped() -> None:
    embedded = replace(ASKED, visual_embeds=(np.zeros((20, 4)),))
    assert all_shuffled(embedded, (1, 7)).visual_embeds == ()
