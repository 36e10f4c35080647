"""Samples -> prompts in one place: order, errors in their places, media in the order of a spec."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from megatron_vrl.data.prompt import PromptEncoder, PromptSpec
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.errors import VideoError
from megatron_vrl.types import EncodedImage, EncodedVideo, ImageFile, VideoClip, Visual
from tests.tiny import video

BAD = VideoError("b.mp4 is empty.", "empty")


class Decoder:
    """Decoder of files that are there by name alone; it keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, clips: Sequence[VideoClip]) -> list[EncodedVideo | VideoError]:
        self.asked.append([clip.path for clip in clips])
        return [BAD if clip.path == "b.mp4" else shown_video(clip.path) for clip in clips]


def shown_video(path: str) -> EncodedVideo:
    return replace(video((1, 2, 2), 1.0, 0), path=path)


def read_image(path: str) -> EncodedImage:
    if path == "broken.png":
        raise VideoError("broken.png cannot be read as an image.")
    frames = video((1, 2, 2), 1.0, 0).frames
    return EncodedImage(path=path, digest=path, grid_thw=(1, 2, 2), frames=frames)


def spec(name: str, *content: str) -> PromptSpec:
    """Return the spec of texts and of files, which are known by their endings."""
    kinds = {"mp4": VideoClip, "png": ImageFile}
    parts = [kinds.get(part.rpartition(".")[2], str)(part) for part in content]
    return PromptSpec(id=name, system=None, content=tuple(parts))


def made(name: str, system: str | None, content: Sequence[str | Visual]) -> list[str]:
    return [name, *(part if isinstance(part, str) else part.path for part in content)]


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def pipeline(decoder: Decoder) -> PromptPipeline:
    return PromptPipeline(decoder, cast(PromptEncoder, SimpleNamespace(encode=made)), read_image)


def test_errors_stand_in_the_places_of_their_samples(
    pipeline: PromptPipeline, decoder: Decoder
) -> None:
    specs = [spec("1", "a.mp4", "?"), spec("2", "a.mp4", "b.mp4"), spec("3", "c.mp4", "?")]
    assert pipeline.load_specs(specs) == [["1", "a.mp4", "?"], BAD, ["3", "c.mp4", "?"]]
    assert decoder.asked == [["a.mp4", "a.mp4", "b.mp4", "c.mp4"]]  # one call for all


def test_media_keep_their_order_and_a_broken_image_is_the_error_of_its_sample(
    pipeline: PromptPipeline,
) -> None:
    mixed = ("1.png", "and", "a.mp4", "2.png", "?", "c.mp4")
    broken = spec("x", "a.mp4", "broken.png", "c.mp4")
    found: list[object] = [*pipeline.load_specs([spec("i", *mixed), broken, spec("t", "?")])]
    assert found[0] == ["i", *mixed] and found[2] == ["t", "?"]
    assert str(found[1]) == "broken.png cannot be read as an image."
