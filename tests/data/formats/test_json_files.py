"""JSON annotation files: separators, byte-order marks, encodings, truncation."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Source
from megatron_vrl.data import pool
from megatron_vrl.data.formats.training import read
from megatron_vrl.data.mix import open_pool
from megatron_vrl.errors import DataError
from megatron_vrl.types import Sample

CHOICE = {
    "id": "1",
    "video": "a.mp4",
    "question": "which colour is the square?",
    "options": ["red", "blue"],
    "duration": 16.0,
    "answer": "A",
}
OTHER = CHOICE | {"id": "2"}
LINE, NEXT = (json.dumps(record, ensure_ascii=False) for record in (CHOICE, OTHER))
ODD = "the red{}square is visible"


SamplesOf = Callable[..., list[Sample]]  # of the name and content of a file


@pytest.fixture(params=["read whole", "indexed"])
def samples_of(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SamplesOf:
    """Return the samples of a multiple_choice file, loaded whole and indexed."""
    if request.param == "indexed":
        monkeypatch.setattr(pool, "READ_WHOLE_BYTES", -1)

    def opened(name: str, content: bytes, form: Any = "multiple_choice") -> list[Sample]:
        (tmp_path / name).write_bytes(content)
        source = Source(json_path=str(tmp_path / name), data_folder="/data", format=form)
        samples = open_pool([source], seed=1)
        return [samples[number] for number in range(len(samples))]

    return opened


@pytest.mark.parametrize("code", [0x2028, 0x2029, 0x85, 0x0B, 0x0C, 0x1C, 0x1E, 0xFEFF, 0])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_any_character_may_occur_in_a_string(samples_of: SamplesOf, code: int, suffix: str) -> None:
    question = ODD.format(chr(code))
    record = json.dumps(CHOICE | {"question": question}, ensure_ascii=False)
    content = f"{record}\n{NEXT}\n" if suffix == ".jsonl" else f"[{record},\n{NEXT}]"
    first, second = samples_of("a" + suffix, content.encode())
    assert (first.query, second.id) == (question, "2")


def test_a_surrogate_pair_is_one_character(samples_of: SamplesOf) -> None:
    (sample,) = samples_of("a.jsonl", json.dumps(CHOICE | {"question": "\U0001f600"}).encode())
    assert sample.query == "\U0001f600"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f"\ufeff{LINE}\n{NEXT}\n"),
        ("a.jsonl", f"{LINE}\r\n\r\n \t\n{NEXT}"),
        ("a.JSONL", f"\n\n{LINE}\n{NEXT}\n\n"),
        ("a.json", f"\ufeff[{LINE},{NEXT}]"),
        ("a.json", f"\r\n [\r\n{LINE} ,\r\n{NEXT}\r\n]\r\n"),
    ],
)
def test_byte_order_marks_and_line_ends(samples_of: SamplesOf, name: str, content: str) -> None:
    assert [sample.id for sample in samples_of(name, content.encode())] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", f"{LINE}\n\n{LINE[:-3]}", ", line 3 is not JSON: Unterminated string"),
        ("a.jsonl", f"[{LINE},\n{NEXT}]\n", ", line 1 is not JSON: .* one list is named .json"),
        ("a.jsonl", f"{LINE},\n{NEXT}\n", ", line 1 is not JSON: Extra data at column"),
        ("a.jsonl", f"{LINE}\nnull\n", ", line 2 is null, expected an object"),
        ("a.jsonl", f"{LINE}\n{LINE.encode()!r}\n", ", line 2 is not JSON: Expecting value"),
        ("a.jsonl", LINE + "\n" + "[" * 100_000, ", line 2 is not JSON: it is nested too deeply"),
        ("a.jsonl", LINE + "\n" + '{"id": 1, "id": 2}', "line 2 is not JSON: the key 'id' occurs"),
        ("a.jsonl", LINE.replace("16.0", "NaN"), ", line 1: field 'duration' is nan, refused"),
        ("a.jsonl", LINE.replace("16.0", "1" * 5000), "line 1: field 'duration' is inf, refused"),
        ("a.jsonl", LINE.replace("16.0", "1e400"), "line 1: field 'duration' is inf, refused"),
        ("a.jsonl", LINE.replace("16.0", "[" * 400 + "]" * 400), "line 1: field 'duration' is \\["),
        ("a.jsonl", LINE.replace('"a.mp4"', '"\\ud800"'), "line 1 is not JSON: a text holds half"),
        ("a.jsonl", LINE.replace('"1"', '"\\ud800"'), "line 1 is not JSON: a text holds half"),
        ("a.jsonl", LINE.replace("a.mp4", "a\\u0000.mp4"), "holds a NUL character"),
        ("a.json", f"[{LINE},\n" + LINE.replace("red", "\\udc00") + "]", "line 2 .* a text holds"),
        ("a.jsonl", LINE + "\n" + "\0" * 100, ", line 2 is not JSON: Expecting value"),
        ("a.jsonl", "", " holds no sample"),
        ("a.jsonl", "\n \n", " holds no sample"),
        ("a.json", "", " is empty; give"),
        ("a.json", "[]", " holds no sample"),
        ("a.json", "{}", " holds no sample"),
        ("a.json", "null", " holds no sample"),
        ("a.json", "12", "does not look like multiple_choice .a list.: it holds a number"),
        ("a.json", f"[{LINE},\n{LINE[:-3]}", ", line 2 is not JSON: Unterminated string"),
        ("a.json", f"[{LINE},\n{NEXT}", ", line 2 is not JSON: The list does not end"),
        ("a.json", f"[{LINE},\n{NEXT},]", ", line 2 is not JSON: Expecting value"),
        ("a.json", f"[{LINE},\n{NEXT}]\n]", ", line 3 is not JSON: Extra data"),
        ("a.json", f"{LINE}\n{NEXT}\n", "line 2 .*; a file with one record a line is named .jsonl"),
        ("a.json", f"[{LINE},\n" + "[" * 100_000, ", line 2 is not JSON: it is nested too deeply"),
        ("a.json", f'[{LINE},\n{{"id": 1, "id": 2}}]', "line 2 is not JSON: the key 'id' occurs"),
    ],
)  # fmt: skip
def test_broken_json_is_one_sentence(
    samples_of: SamplesOf, name: str, content: str, sentence: str
) -> None:
    with pytest.raises(DataError, match=rf"/{name}.*{sentence}") as error:
        samples_of(name, content.encode())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", LINE.encode() + b'\n{"id": "\xba\xec"}\n', "a.jsonl, line 2 is not UTF-8"),
        ("a.json", b'[1,\n{"id": "\xba\xec"}]', "a.json, line 2 is not UTF-8"),
        ("a.jsonl", f"{LINE}\n".encode("utf-16"), "a.jsonl is in UTF-16: save it as UTF-8"),
        ("a.json", f"[{LINE}]".encode("utf-16"), "a.json is in UTF-16: save it as UTF-8"),
        ("a.json.gz", gzip.compress(f"[{LINE}]".encode()), "is compressed with gzip: unpack it"),
    ],
)
def test_content_that_is_not_utf8_is_an_error(
    samples_of: SamplesOf, name: str, content: bytes, sentence: str
) -> None:
    for form in ("multiple_choice", "charades_sta"):
        with pytest.raises(DataError) as error:
            samples_of(name, content, form)
        if form == "multiple_choice" and "line 2" in sentence and name == "a.json":
            continue  # its first record is refused before
        assert sentence in str(error.value)


def test_a_folder_and_a_missing_file(samples_of: SamplesOf, tmp_path: Path) -> None:
    for form in ("multiple_choice", "charades_sta", "next_gqa"):
        for name, why in {"folder.json": "Is a directory", "gone.json": "No such file"}.items():
            (tmp_path / "folder.json").mkdir(exist_ok=True)
            source = Source(json_path=str(tmp_path / name), data_folder="/data", format=form)
            with pytest.raises(DataError, match=f"Cannot read the annotations .*{name}: {why}"):
                open_pool([source], seed=1)


def test_a_byte_order_mark_before_records_by_video(tmp_path: Path) -> None:
    record = {"duration": 16.0, "timestamps": [[3.0, 8.0]], "sentences": ["the red square"]}
    path = tmp_path / "a.json"
    path.write_bytes(
        ("\ufeff" + json.dumps({"a": record}, indent=1)).replace("\n", "\r\n").encode()
    )
    (sample,) = read(Source(json_path=str(path), data_folder="/data", format="charades_sta"))
    assert sample.query == "the red square"
