"""Rows and tables that are broken or not supported: each is refused with one sentence."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vrl.config import Source
from megatron_vrl.data.formats.training import read
from megatron_vrl.data.formats.training import samples_of as samples_of_record
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.types import Sample
from tests.data.formats.row_files import SHAREGPT, TEXT, VERL, VIDEO, png, samples_of, write

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
