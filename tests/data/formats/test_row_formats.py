"""Rows of verl, EasyR1, Hugging Face datasets and LLaMA-Factory, in every kind of file."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Source
from megatron_vrl.data import pool
from megatron_vrl.data.mix import open_pool
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS, can_be_asked
from megatron_vrl.types import MEDIA_PLACE, ImageFile, VideoClip
from tests.data.formats.row_files import OPENAI, SHAREGPT, TEXT, VERL, VIDEO, png, samples_of, write


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.arrow", "folder"])
def test_verl_rows_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    texts = [TEXT | {"prompt": [{"role": "user", "content": "1 + 1?"}]} for _ in range(2)]
    texts = [text | {"reward_model": {"ground_truth": "2"}} for text in texts]
    image, video, text, _ = samples_of(tmp_path / name, [VERL, VIDEO, *texts])
    stem = Path(name).stem
    assert (image.id, image.task, image.labels) == (
        f"{stem}/0",
        "short_answer",
        ("data_source/geo3k",),
    )
    assert image.media == (ImageFile("/data/a.png"),)
    assert image.query == f"{MEDIA_PLACE}How many sides?" and image.truth.answer == "3"
    assert video.media == (VideoClip("/data/a.mp4"), ImageFile("/data/x/b.png"))
    assert video.query == f"A {MEDIA_PLACE} first, then {MEDIA_PLACE}: how many?"
    assert (text.id, text.media, text.query, text.truth.answer) == ("sum", (), "1 + 1?", "2")
    for sample in (image, video, text):
        assert can_be_asked(sample)
        task = TASKS[sample.task]
        assert task.parse(task.target(sample), sample).formatted


def test_easyr1_columns_and_worked_solutions(tmp_path: Path) -> None:
    rows = [
        {"problem": "<image>x?", "answer": r"so \boxed{\frac{1}{2}}.", "images": ["a.png"]},
        {"problem": "y?", "answer": "<answer> 4 </answer>"},
    ]
    keys = {"prompt_key": "problem", "answer_key": "answer"}
    first, second = samples_of(tmp_path / "a.jsonl", rows, **keys)
    assert first.truth.answer == r"\frac{1}{2}" and second.truth.answer == "4"
    deep = [{"prompt": "y?", "extra_info": {"answer": 0.5}}]
    (sample,) = samples_of(tmp_path / "b.jsonl", deep, answer_key="extra_info.answer")
    assert sample.truth.answer == "0.5"


def test_embedded_files_are_written_once(tmp_path: Path) -> None:
    embedded = {"bytes": png(), "path": "a.jpg"}
    rows = [
        {"image": embedded, "prompt": "What?", "answer": "red"},
        {"image": embedded, "prompt": "Which colour?", "answer": "red"},
        {"image": {"bytes": png("blue"), "path": None}, "prompt": "What?", "answer": "blue"},
        {"clip": {"bytes": b"video", "path": "b.webm"}, "prompt": "What?", "answer": "red"},
    ]
    keys = {"image_key": "image", "video_key": "clip"}
    samples = samples_of(tmp_path / "a.parquet", rows, "hf", **keys)
    first, again, blue, clip = (sample.media[0] for sample in samples)
    assert first == again and first != blue and samples[0].query == "What?"
    cache = tmp_path / "cache"
    assert {Path(one.path) for one in (first, blue, clip)} == set(cache.iterdir())
    assert Path(first.path).suffix == ".png" and Path(clip.path).suffix == ".webm"
    assert Path(first.path).read_bytes() == png() and first.folder == str(cache)
    assert samples[0].inside("/data").media[0].folder == str(cache)
    written = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    samples_of(tmp_path / "b.parquet", rows, "hf", **keys)
    assert written == {file: file.stat().st_mtime_ns for file in cache.iterdir()}


def test_files_of_hf_without_places_come_before_the_text(tmp_path: Path) -> None:
    rows = [{"images": ["a.png", "b.png"], "videos": "c.mp4", "prompt": "q?", "answer": 1}]
    (sample,) = samples_of(tmp_path / "a.json", rows, "hf")
    names = [Path(medium.path).name for medium in sample.media]
    assert (names, sample.query) == (["c.mp4", "a.png", "b.png"], "q?")
    with pytest.raises(DataError, match="record 0 has 0 places <image> in its text and 2 images"):
        samples_of(tmp_path / "b.json", rows, answer_key="answer")


def test_other_tasks_have_an_object_as_answer(tmp_path: Path) -> None:
    interval: dict[str, Any] = {"duration": 30.0, "intervals": [[6.0, 15.0]]}
    choice = {"options": ["(A) red", "(B) blue"], "answer": "(B)"}
    for task, truth in {
        "temporal_grounding": interval,
        "multi_segment_grounding": interval,
        "multiple_choice": choice,
        "grounded_qa": interval | choice,
    }.items():
        row = VIDEO | {"images": None, "prompt": "<video>a door opens"}
        row["reward_model"] = {"ground_truth": json.dumps(truth)}
        (sample,) = samples_of(tmp_path / f"{task}.json", [row], task=task)
        assert sample.task == task and can_be_asked(sample)
        assert sample.duration_s == (30.0 if "intervals" in truth else 0.0)
        assert sample.option == ("B" if "options" in truth else "")
        wide = row | {"reward_model": {"ground_truth": truth}}
        assert samples_of(tmp_path / "a.jsonl", [wide], task=task)[0].truth == sample.truth


def test_llamafactory_in_both_forms(tmp_path: Path) -> None:
    sharegpt, openai = samples_of(tmp_path / "a.json", [SHAREGPT, OPENAI], "llamafactory")
    assert sharegpt.query == f"{MEDIA_PLACE}What {MEDIA_PLACE}?"
    assert sharegpt.media == (ImageFile("/data/a.png"), ImageFile("/data/b.png"))
    assert (sharegpt.rationale, sharegpt.truth.answer) == ("two pictures", "cats")
    assert TASKS["short_answer"].target(sharegpt) == SHAREGPT["conversations"][1]["value"]  # type: ignore[index]
    assert openai.media == (VideoClip("/data/a.mp4"),) and openai.truth.answer == "a dog"


def test_dataset_info_names_columns_and_tags(tmp_path: Path) -> None:
    entry = {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "videos": "clips"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "u", "assistant_tag": "a"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"other": {}, "mine": entry}))
    talk = [{"who": "u", "says": "<video>Who?"}, {"who": "a", "says": "a dog"}]
    rows = [{"talk": talk, "clips": ["a.mp4"]}]
    (sample,) = samples_of(tmp_path / "mine.json", rows, "llamafactory")
    assert (sample.media, sample.truth.answer) == ((VideoClip("/data/a.mp4"),), "a dog")
    for changes, sentence in (
        ({"formatting": "alpaca"}, "has the formatting 'alpaca', expected 'sharegpt'"),
        ({"ranking": True}, "describes preference pairs, which are not read"),
        ({"columns": {"messages": 3}}, "field 'messages' is 3, refused"),
    ):
        (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry | changes}))
        with pytest.raises(DataError, match=sentence):
            samples_of(tmp_path / "mine.json", rows, "llamafactory")


def test_large_files_are_indexed_with_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"problem": "<image>x?", "answer": "4", "images": ["a.png"]},
        {"problem": "y?", "answer": 5},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    keys = {"prompt_key": "problem", "answer_key": "answer", "weight": 2.0}
    source = {"json_path": str(path), "data_folder": "/data", "format": "verl"}
    monkeypatch.setattr(pool, "READ_WHOLE_BYTES", -1)
    opened = open_pool([Source.model_validate(source | keys)], seed=1)
    assert isinstance(opened._parts[0], pool.IndexedSource)
    assert [opened[number].truth.answer for number in range(2)] == ["4", "5"]
    assert opened[0].media == (ImageFile("/data/a.png", "/data"),)


def test_other_list_formats_are_read_from_tables(tmp_path: Path) -> None:
    row = {"id": "1", "video": "a.mp4", "question": "q?", "options": ["red", "blue"]}
    rows = [row | {"duration": 16.0, "answer": "A", "clip": None}]
    (sample,) = samples_of(tmp_path / "a.parquet", rows, "multiple_choice")
    assert (sample.option, sample.media) == ("A", (VideoClip("/data/a.mp4"),))
    with pytest.raises(
        DataError, match=r"does not look like next_gqa .* looks like multiple_choice"
    ):
        samples_of(tmp_path / "b.parquet", rows, "next_gqa")
