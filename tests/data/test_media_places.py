"""Places of videos and images in a sample's texts, and what readers refuse."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import Reader
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
