"""Samples -> prompts in one place: order, errors in their places, videos and images of one spec."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from megatron_vrl.data.prompt import PromptEncoder, PromptSpec
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.errors import VideoError
from megatron_vrl.types import EncodedImage, EncodedVideo, VideoClip
from tests.tiny import video

BAD = VideoError("b.mp4 is empty.", "empty")


class Decoder:
    """Decoder of files that are there by name alone; it keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[VideoClip | str]] = []

    def encode(self, clips: Sequence[VideoClip | str]) -> list[EncodedVideo | VideoError]:
        self.asked.append(list(clips))
        return [BAD if clip == "b.mp4" else video((1, 2, 2), 1.0, 0) for clip in clips]


def read_image(path: str) -> EncodedImage:
    if path == "broken.png":
        raise VideoError("broken.png cannot be read as an image.")
    frames = video((1, 2, 2), 1.0, 0).frames
    return EncodedImage(path=path, digest=path, grid_thw=(1, 2, 2), frames=frames)


def spec(name: str, *videos: str, images: tuple[str, ...] = ()) -> PromptSpec:
    return PromptSpec(id=name, system=None, videos=videos, images=images, question=f"{name}?")


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def pipeline(decoder: Decoder) -> PromptPipeline:
    made = lambda name, system, visuals, question: (name, len(visuals), question)  # noqa: E731
    return PromptPipeline(decoder, cast(PromptEncoder, SimpleNamespace(encode=made)), read_image)


def test_errors_stand_in_the_places_of_their_samples(
    pipeline: PromptPipeline, decoder: Decoder
) -> None:
    specs = [spec("first", "a.mp4"), spec("second", "a.mp4", "b.mp4"), spec("third", "c.mp4")]
    assert pipeline.load_specs(specs) == [("first", 1, "first?"), BAD, ("third", 1, "third?")]
    assert decoder.asked == [["a.mp4", "a.mp4", "b.mp4", "c.mp4"]]  # one call for all


def test_images_follow_the_videos_and_a_broken_one_is_the_error_of_its_sample(
    pipeline: PromptPipeline,
) -> None:
    broken = spec("x", "a.mp4", images=("broken.png",))
    specs = [spec("i", "a.mp4", images=("1.png", "2.png")), broken, spec("t")]
    found: list[object] = [*pipeline.load_specs(specs)]
    assert found[0] == ("i", 3, "i?") and found[2] == ("t", 0, "t?")
    assert str(found[1]) == "broken.png cannot be read as an image."
