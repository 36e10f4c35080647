"""Rows of verl, EasyR1, Hugging Face datasets and LLaMA-Factory, in every kind of file."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from megatron_vrl.config import Source
from megatron_vrl.data import pool
from megatron_vrl.data.formats.training import read
from megatron_vrl.data.formats.training import samples_of as samples_of_record
from megatron_vrl.data.mix import open_pool
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.tasks import TASKS, can_be_asked
from megatron_vrl.types import MEDIA_PLACE, ImageFile, Sample, VideoClip

VERL = {
    "data_source": "geo3k",
    "prompt": [{"role": "user", "content": "<image>How many sides?"}],
    "images": ["a.png"],
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 7, "split": "train"},
}
VIDEO = VERL | {
    "prompt": [{"role": "user", "content": "A <video> first, then <image>: how many?"}],
    "images": ["x/b.png"],
    "videos": [{"video": "file:///data/a.mp4", "fps": 2.0}],
}
TEXT = {"prompt": "1 + 1?", "reward_model": {"ground_truth": 2}, "id": "sum"}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>What <image>?"},
        {"from": "gpt", "value": "<think>two pictures</think><answer>cats</answer>"},
    ],
    "images": ["a.png", "b.png"],
}
OPENAI = {
    "messages": [
        {"role": "user", "content": "<video>Who walks in?"},
        {"role": "assistant", "content": "a dog"},
    ],
    "videos": ["a.mp4"],
}


def png(colour: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "PNG")
    return content.getvalue()


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as the kind of file that the ending names; a folder is one of `save_to_disk`."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet.write_table(table_of(rows), path)
    elif path.suffix == ".arrow":
        table = table_of(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    else:
        path.mkdir()
        half = len(rows) // 2
        names = [f"data-{number:05}-of-00002.arrow" for number in range(2)]
        for name, part in zip(names, (rows[:half], rows[half:]), strict=True):
            write(path / name, part)
        state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
        (path / "state.json").write_text(json.dumps(state))
        (path / "dataset_info.json").write_text("{}")
    return path


def table_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return the rows with the columns of all of them, null where a row has none."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in columns})


def samples_of(path: Path, rows: Sequence[Any], form: str = "verl", **keys: Any) -> list[Sample]:
    source = {"json_path": str(write(path, rows)), "data_folder": "/data", "format": form}
    cache = {"media_cache_dir": str(path.parent / "cache")}
    return read(Source.model_validate(source | cache | keys))


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


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x?"}]
TURNS = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": None}, "has no field 'prompt'; its fields are data_source, prompt, images, "),
        ({"prompt": 3}, "field 'prompt' is 3, expected a text or a list of messages"),
        (
            {"prompt": ["x"]},
            r"field 'prompt'\[0\] is 'x', expected an object with role and content",
        ),
        ({"prompt": SYSTEM, "images": None}, "has a system message, 'Be brief.'"),
        (
            {"prompt": TURNS},
            r"has the turns \['user', 'assistant', 'user'\], expected one user turn",
        ),
        (
            {"images": ["a.png", "b.png"]},
            "has 1 place <image> in its text and 2 images; expected eq",
        ),
        ({"images": None}, "has 1 place <image> in its text and 0 images; expected equal numbers"),
        ({"videos": ["a.mp4"]}, "has 0 places <video> in its text and 1 video; expected equal"),
        (
            {"images": ["../a.png"]},
            r"'images'\[0\] is '../a.png', which is no path inside the data",
        ),
        ({"images": ["/etc/a.png"]}, r"'images'\[0\] is '/etc/a.png', which is no path inside"),
        ({"images": ["a\0.png"]}, r"'images'\[0\] is 'a\\x00.png', which is no path inside"),
        ({"images": [7]}, r"field 'images'\[0\] is 7, expected the path of a file, or an object"),
        ({"images": [[]]}, r"field 'images'\[0\] is \[\], expected the path of a file"),
        ({"images": [{"path": None}]}, r"'images'\[0\] is \{'path': None\}, expected the path"),
        ({"videos": [{"video": "a.mp4", "video_start": 2.0}]}, "video_start is 2.0: parts of vid"),
        ({"reward_model": {"ground_truth": None}}, "has no field 'reward_model.ground_truth'; its"),
        ({"reward_model": {"ground_truth": float("nan")}}, "is nan, expected a text or a number"),
        ({"reward_model": {"ground_truth": " "}}, "ground_truth' is ' ', expected a text or a num"),
        ({"reward_model": {"ground_truth": ["3"]}}, r"ground_truth' is \['3'\], expected a text"),
        ({"reward_model": {"ground_truth": r"\boxed{3"}}, r"the \\boxed\{ is never closed"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
            "expected a text, or an i",
        ),
    ],
)
def test_what_is_wrong_in_a_row_is_named(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as error:
        samples_of(tmp_path / "a.json", [VERL | changes])
    assert str(error.value).startswith(f"{tmp_path}/a.json: record 0")
    assert str(error.value).count("\n") == 0 and str(error.value).endswith(
        (".", "is the only one.")
    )


@pytest.mark.parametrize(
    ("task", "truth", "sentence"),
    [
        ("temporal_grounding", "3", "is '3', expected an object, or one as JSON"),
        ("temporal_grounding", {"duration": 3.0}, "field 'intervals' is missing, which temporal_g"),
        ("temporal_grounding", {"intervals": [[1, 2]]}, "field 'duration' is missing, which temp"),
        ("temporal_grounding", {"duration": -1.0}, "field 'duration' is -1.0, refused: Input sho"),
        ("multiple_choice", {"options": ["a", "b"], "answer": "C"}, "field 'answer' is 'C', expec"),
    ],
)
def test_what_is_wrong_in_a_truth_is_named(
    tmp_path: Path, task: str, truth: Any, sentence: str
) -> None:
    row = VIDEO | {"prompt": "<video>x", "images": None, "reward_model": {"ground_truth": truth}}
    with pytest.raises(DataError, match=f"ground_truth'.*{sentence}"):
        samples_of(tmp_path / "a.json", [row], task=task)


def test_a_task_about_time_needs_its_video(tmp_path: Path) -> None:
    truth = {"duration": 30.0, "intervals": [[6.0, 15.0]]}
    row = VERL | {"reward_model": {"ground_truth": truth}}
    with pytest.raises(
        DataError, match=r"has 0 videos, expected exactly one for the task temporal"
    ):
        samples_of(tmp_path / "a.json", [row], task="temporal_grounding")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"conversations": "x"}, "field 'conversations' is 'x', expected messages"),
        ({"conversations": ["x"]}, r"\[0\] is 'x', expected an object with from and value"),
        ({"conversations": SHAREGPT["conversations"] * 2}, "expected human and gpt: one answer"),  # type: ignore[operator]
        ({"instruction": "x"}, r"has the format alpaca \(field 'instruction'\), expected conversa"),
        ({"tools": "[]"}, "field 'tools' is not read: leave it out"),
        ({"system": "Be brief."}, "has a system message, 'Be brief.'"),
        ({"images": ["a.png"]}, "has 2 places <image> in its text and 1 image; expected equal"),
    ],
)
def test_what_is_wrong_in_a_conversation_is_named(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=f"a.json: record 0.*{sentence}"):
        samples_of(tmp_path / "a.json", [SHAREGPT | changes], "llamafactory")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "path", "video", "from", "value"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=100)
@given(
    st.sampled_from([("verl", VERL), ("hf", VERL), ("llamafactory", SHAREGPT)]),
    st.sampled_from(
        ["prompt", "images", "videos", "reward_model", "conversations", "system", "id"]
    ),
    VALUES,
)
def test_any_value_gives_a_sample_or_one_sentence(
    format_and_row: tuple[str, dict[str, Any]], field: str, value: Any
) -> None:
    form, row = format_and_row
    keys = {} if form == "llamafactory" else {"answer_key": "reward_model.ground_truth"}
    paths = {"json_path": "rows.json", "data_folder": "/data", "format": form}
    source = Source.model_validate(paths | keys)
    try:
        (sample,) = samples_of_record(row | {field: value}, 0, source)
    except DataError as error:
        assert "rows.json: record" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(sample, Sample)


def test_system_messages_are_left_out_on_request(tmp_path: Path) -> None:
    row: dict[str, Any] = VERL | {"prompt": SYSTEM, "images": None}
    (sample,) = samples_of(tmp_path / "a.json", [row], ignore_system=True)
    assert sample.query == "x?"
    row = SHAREGPT | {"system": "Be brief."}
    samples_of(tmp_path / "b.json", [row], "llamafactory", ignore_system=True)


def test_broken_tables_are_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [TEXT])
    content = path.read_bytes()
    for name, spoiled in (
        ("cut.parquet", content[:-20]),
        ("empty.parquet", b""),
        ("text.parquet", b"x" * 99),
        ("text.arrow", b"x" * 99),
    ):
        (tmp_path / name).write_bytes(spoiled)
        source = Source(json_path=str(tmp_path / name), data_folder="/data", format="verl")
        with pytest.raises(DataError, match=rf"{name} is no readable table \(.+\): replace it\.$"):
            read(source)
    gone = source.model_copy(update={"json_path": str(tmp_path / "gone.parquet")})
    with pytest.raises(
        DataError, match=r"Cannot read the annotations .*gone.parquet: No such file"
    ):
        read(gone)


def test_a_table_with_another_name_or_format_is_one_sentence(tmp_path: Path) -> None:
    content = write(tmp_path / "a.parquet", [TEXT]).read_bytes()
    (tmp_path / "a.json").write_bytes(content)
    for name, form in (("a.json", "verl"), ("a.parquet", "charades_sta")):
        paths = {"json_path": str(tmp_path / name), "data_folder": "/data", "format": form}
        with pytest.raises(DataError, match=r"is a parquet table: name it \.parquet, and give"):
            read(Source.model_validate(paths))


def test_broken_folders_are_one_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", [TEXT, TEXT])
    source = Source(json_path=str(folder), data_folder="/data", format="verl")
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json lists no data files: save the dataset again"):
        read(source)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"folder holds several splits \(train, test\): give the f"):
        read(source)


def test_bytes_that_cannot_be_a_file_are_named(tmp_path: Path) -> None:
    rows = [{"images": [{"bytes": b"no picture"}], "prompt": "x?", "answer": "y"}]
    with pytest.raises(
        DataError, match=r"record 0: field 'images'\[0\] holds 10 bytes that are no"
    ):
        samples_of(tmp_path / "a.parquet", rows, "hf")
    rows = [{"images": [{"bytes": png()}], "prompt": "x?", "answer": "y"}]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"cannot be written to .*/file \(File exists\): give anoth"
    ):
        samples_of(tmp_path / "a.parquet", rows, "hf", media_cache_dir=str(tmp_path / "file"))
    big = [rows[0] | {"images": None, "videos": [{"bytes": bytes(2 << 20), "path": None}]}]
    with pytest.raises(DataError, match=r"has 2.0 MiB, and .* would exceed media_cache_mib=1: ra"):
        samples_of(tmp_path / "b.parquet", big, "hf", media_cache_mib=1)


def test_keys_that_a_format_does_not_read_are_refused() -> None:
    paths = {"json_path": "a.json", "data_folder": "/data"}
    with pytest.raises(ValueError, match="format temporal_r1 does not read the key task: remove"):
        Source.model_validate(paths | {"task": "multiple_choice"})
    with pytest.raises(ValueError, match="llamafactory does not read the key prompt_key"):
        Source.model_validate(paths | {"format": "llamafactory", "prompt_key": "x"})
    Source.model_validate(paths | {"prompt_key": "prompt"})


def test_an_unknown_task_is_refused_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the task 'vqa', which is not known; known: tempor"):
        samples_of(tmp_path / "a.json", [VERL], task="vqa")


def test_other_list_formats_are_read_from_tables(tmp_path: Path) -> None:
    row = {"id": "1", "video": "a.mp4", "question": "q?", "options": ["red", "blue"]}
    rows = [row | {"duration": 16.0, "answer": "A", "clip": None}]
    (sample,) = samples_of(tmp_path / "a.parquet", rows, "multiple_choice")
    assert (sample.option, sample.media) == ("A", (VideoClip("/data/a.mp4"),))
    with pytest.raises(
        DataError, match=r"does not look like next_gqa .* looks like multiple_choice"
    ):
        samples_of(tmp_path / "b.parquet", rows, "next_gqa")
