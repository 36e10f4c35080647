"""Samples -> prompts in one place: order, errors in their places, media in the order of a spec."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from megatron_vrl.data.prompt import PromptEncoder, PromptSpec
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.errors import VideoError
from megatron_vrl.types import ImageFile, Media, VideoClip, Visual
from tests.tiny import image, video

BAD = VideoError("b.png is empty.", "empty", "b.png")


class Reader:
    """Reader of files that are there by name alone; it keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def read(self, media: Sequence[Media]) -> list[Visual | VideoError]:
        self.asked.append([medium.path for medium in media])
        return [self._one(medium) for medium in media]

    @staticmethod
    def _one(medium: Media) -> Visual | VideoError:
        if medium.path == BAD.path:
            return BAD
        if isinstance(medium, VideoClip):
            return replace(video((1, 2, 2), 1.0, 0), path=medium.path)
        return replace(image((2, 2), 0), path=medium.path)


def spec(name: str, *content: str) -> PromptSpec:
    """Return the spec of texts and of files, which are known by their endings."""
    kinds = {"mp4": VideoClip, "png": ImageFile}
    parts = [kinds.get(part.rpartition(".")[2], str)(part) for part in content]
    return PromptSpec(id=name, system=None, content=tuple(parts))


def made(name: str, system: str | None, content: Sequence[str | Visual]) -> list[str]:
    return [name, *(part if isinstance(part, str) else part.path for part in content)]


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def pipeline(reader: Reader) -> PromptPipeline:
    return PromptPipeline(reader, cast(PromptEncoder, SimpleNamespace(encode=made)))


def test_errors_stand_in_the_places_of_their_samples(
    pipeline: PromptPipeline, reader: Reader
) -> None:
    specs = [spec("1", "a.mp4", "?"), spec("2", "a.mp4", "b.png", "c.mp4"), spec("3", "c.mp4")]
    assert pipeline.load_specs(specs) == [["1", "a.mp4", "?"], BAD, ["3", "c.mp4"]]
    assert reader.asked == [["a.mp4", "a.mp4", "b.png", "c.mp4", "c.mp4"]]  # one call for all


def test_media_keep_their_order(pipeline: PromptPipeline) -> None:
    mixed = ("1.png", "and", "a.mp4", "2.png", "?", "c.mp4")
    found: list[object] = [*pipeline.load_specs([spec("i", *mixed), spec("t", "?")])]
    assert found == [["i", *mixed], ["t", "?"]]
