"""The generic format: a task's own truth is validated by its model, and what is wrong is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from megatron_vrl.config import Source
from megatron_vrl.data.formats.training import read
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS, Truth, can_be_asked

RECORD = {
    "id": "a/0",
    "task": "counting",
    "video": "a.mp4",
    "duration": 16.0,
    "question": "a ball bounces",
    "truth": {"count": 3},
}


class Count(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    count: int


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Source]:
    task = replace(TASKS["temporal_grounding"], name="counting", truth=Truth(record=Count))
    monkeypatch.setitem(TASKS, "counting", task)

    def write(**changes: Any) -> Source:
        path = tmp_path / "counts.json"
        path.write_text(json.dumps([RECORD | changes]))
        return Source(json_path=str(path), data_folder="/clips", format="generic")

    return write


def test_a_truth_comes_as_an_object_of_its_task(source: Callable[..., Source]) -> None:
    (sample,) = read(source(clip=[2.0, 12.0]))
    assert (sample.task, sample.first_path) == ("counting", "/clips/a.mp4")
    assert sample.truth == Count(count=3) and hash(sample)
    assert (sample.window_s, sample.duration_s) == ((2.0, 12.0), 10.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"truth": {}}, "record 'a/0': field 'truth.count' is missing."),
        ({"truth": {"count": "3"}}, "record 'a/0': field 'truth.count' is '3', refused: Input"),
        ({"truth": {"count": 3, "x": 1}}, "record 'a/0': field 'truth.x' is 1, refused: Extra"),
        ({"task": "multiple_choice"}, "field 'task' is 'multiple_choice', expected a task with a"),
        ({"duration": 0}, "field 'duration' is 0, refused"),
    ],
)
def test_what_is_wrong_is_named(
    source: Callable[..., Source], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError) as error:
        read(source(**changes))
    assert sentence in str(error.value)


def test_a_sample_without_its_truth_cannot_be_asked(source: Callable[..., Source]) -> None:
    (sample,) = read(source())
    assert can_be_asked(sample)
    assert not can_be_asked(replace(sample, truth=None))
    assert not can_be_asked(replace(sample, query=""))
