"""Places of videos and images in a sample's texts, and what readers refuse."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from megatron_vrl.config import Data, Source
from megatron_vrl.data.formats.records import Reader
from megatron_vrl.data.formats.training import READERS
from megatron_vrl.data.media_limits import MediaLimits, limits_of
from megatron_vrl.data.mix import load, open_pool
from megatron_vrl.data.pool import IndexedSource
from megatron_vrl.data.prompt import placed
from megatron_vrl.errors import DataError
from megatron_vrl.types import MEDIA_PLACE, ImageFile, Media, Sample, VideoClip
from tests.data.test_mix import sample

A, B = VideoClip("a.mp4"), ImageFile("b.png")
SOURCE = Source(json_path="a.json", data_folder="/data", format="generic")
CHOICE = replace(
    sample(0), task="multiple_choice", intervals_s=(), options=("red", "blue"), option="A"
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Is it red?", (A, B, "Is it red?")),
        (f"Is {MEDIA_PLACE} or {MEDIA_PLACE} red?", ("Is ", A, " or ", B, " red?")),
        (f"{MEDIA_PLACE}{MEDIA_PLACE}", (A, B)),
    ],
)
def test_media_stand_at_their_places(text: str, content: tuple[str | Media, ...]) -> None:
    assert placed("a", text, (A, B)) == content


def test_another_number_of_places_is_refused_and_a_text_alone_stays() -> None:
    with pytest.raises(DataError, match=r"sample a has 1 place .* has 2 of them"):
        placed("a", f"{MEDIA_PLACE}?", (A, B))
    assert placed("a", "", ()) == ("",)


def read(made: Sample, has_places: bool = True) -> Sample:
    """Return what a reader makes of a sample."""

    def samples(records: Iterable[Any], source: Source, _: Any) -> Iterator[Sample]:
        yield made

    schema: TypeAdapter[Any] = TypeAdapter(list[Any])
    reader = Reader(schema=schema, samples=samples, is_list=True, has_places=has_places)
    (found,) = reader.read([], SOURCE, None)
    return found


def test_a_format_without_places_loses_the_character() -> None:
    spoiled = replace(sample(0), query=f"a {MEDIA_PLACE}door")
    assert read(spoiled, has_places=False).query == "a door"
    assert read(spoiled).query == spoiled.query
    several = replace(CHOICE, media=(A, B), query=MEDIA_PLACE, options=(MEDIA_PLACE, "blue"))
    assert read(several) == several
    spoken = replace(several, rationale=f"{MEDIA_PLACE} it is")
    assert read(spoken) == replace(several, rationale="it is")  # a target shows no media


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (replace(sample(0), media=(A, A)), "has 2 videos, expected exactly one for the task temp"),
        (replace(sample(0), media=(B,)), "has 0 videos, expected exactly one for the task temp"),
        (replace(CHOICE, media=(), query=MEDIA_PLACE), "has 1 place .* and 0 of them"),
    ],
)
def test_media_that_a_sample_cannot_have_are_refused(made: Sample, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read(made)


def test_more_media_than_the_configuration_allows_are_refused_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def samples(records: Iterable[Any], source: Source, _: Any) -> Iterator[Sample]:
        for number, _record in records:
            yield replace(CHOICE, id=str(number), media=(A, B, B))

    schema: TypeAdapter[Any] = TypeAdapter(list[Any])
    monkeypatch.setitem(READERS, "generic", Reader(schema=schema, samples=samples, is_list=True))
    path = tmp_path / "a.json"
    path.write_text("[{}]")
    source = Source(json_path=str(path), data_folder="/data", format="generic")
    (kept,) = load([source], 1, limits=limits_of(Data(max_images=2, max_videos=1)))
    assert kept.media == (A._replace(folder="/data"), *[B._replace(folder="/data")] * 2)
    for limits, sentence in (
        (
            MediaLimits(videos=1, images=1),
            "record '0': it has 2 images, over data.max_images=1:",
        ),
        (
            MediaLimits(videos=0, images=2),
            "record '0': it has 1 video, over data.max_videos=0:",
        ),
    ):
        for opened in (
            lambda: open_pool([source], 1, limits=limits),  # noqa: B023
            lambda: IndexedSource(source, None, limits),  # noqa: B023
        ):
            with pytest.raises(DataError, match=sentence):
                opened()
