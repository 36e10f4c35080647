"""Indexed annotation files give the samples that loading them whole gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Source
from megatron_vrl.data import pool
from megatron_vrl.data.formats import json_files
from megatron_vrl.data.formats.training import read
from megatron_vrl.data.mix import SampleStream, open_pool
from megatron_vrl.data.pool import IndexedSource
from megatron_vrl.data.problems import Problem
from megatron_vrl.errors import DataError, VideoError
from tests.running import ENVIRONMENT, ROOT

RECORD = {
    "id": "0",
    "video": "a/0.mp4",
    "question": "what is shown",
    "options": ["(A) a square", "(B) a circle"],
    "duration": 9.0,
    "answer": "(B)",
}
RECORDS = [RECORD | {"id": str(i), "question": f'"{i}" [{{é}}] \\ ' * (i % 5)} for i in range(60)]
TEXT = st.text(st.sampled_from('"\\[]{}, é\n\u20ac:0'), max_size=12)


def source_of(path: Path, form: Any = "multiple_choice", strategy: str = "all") -> Source:
    return Source(json_path=str(path), data_folder="/data", format=form, sampling_strategy=strategy)


@given(
    records=st.lists(st.dictionaries(TEXT, TEXT | st.lists(TEXT, max_size=2), max_size=3)),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    block=st.integers(1, 40),
)
def test_records_are_found_whatever_they_hold(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    indent: int | None,
    ascii_only: bool,
    block: int,
) -> None:
    path = tmp_path_factory.mktemp("pool") / "list.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    before, json_files.BLOCK_BYTES = json_files.BLOCK_BYTES, block
    try:
        found = list(json_files.records(str(path)))
    finally:
        json_files.BLOCK_BYTES = before
    content = path.read_bytes()
    assert [one.record for one in found] == records
    assert [json.loads(content[one.start : one.stop]) for one in found] == records


@pytest.mark.parametrize("content", ["", "{}", "[1", "[1 2]", '[{"a": }]', "[1,", "[1,]", "[1] 2"])
@pytest.mark.parametrize("block", [1, 2, 1000])
def test_a_file_without_a_list_is_an_error(
    tmp_path: Path, content: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "BLOCK_BYTES", block)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json(, line 1)? is n"):
        list(json_files.records(str(tmp_path / "a.json")))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_indexed_source_gives_the_samples_of_a_whole_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"records{suffix}"
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n"
    path.write_text(lines if suffix == ".jsonl" else json.dumps(RECORDS), encoding="utf-8")
    indexed = IndexedSource(source_of(path), None)
    assert len(indexed) == len(RECORDS)
    drawn = [indexed[number] for number in range(len(indexed))]
    assert drawn[0] is None  # it asks nothing
    assert [sample for sample in drawn if sample] == read(source_of(path))


def test_a_stream_over_an_indexed_pool_skips_unusable_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS))
    monkeypatch.setattr(pool, "READ_WHOLE_BYTES", 0)
    sources = [source_of(path, strategy="first:30"), source_of(path, strategy="end:50%")]
    samples = open_pool(sources, seed=1)
    assert len(samples) == 60
    stream = SampleStream(samples, seed=1)
    epoch = stream.take(48)
    assert {sample.id for sample in epoch} == {str(i) for i in range(60) if i % 5}
    assert {medium.folder for sample in epoch for medium in sample.media} == {"/data"}
    later = SampleStream(samples, seed=1)
    later.restore(stream.state)
    ahead = later.peek(5)
    assert later.take(5) == ahead == stream.take(5)


def test_an_invalid_record_is_reported_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    wrong = RECORD | {"duration": 0}
    path.write_text("\n\n".join(json.dumps(record) for record in (RECORD, wrong)))
    with pytest.raises(DataError, match="jsonl, line 3: field 'duration' is 0, refused"):
        IndexedSource(source_of(path), None)


def test_a_file_that_changes_during_the_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    indexed = IndexedSource(source_of(path), None)
    assert indexed[0].id == "0"
    path.write_text("x" + json.dumps(RECORD) + "\n")
    with pytest.raises(DataError, match=r"records\.jsonl was changed during the run: record 0 "):
        indexed[0]


def test_a_duration_is_read_when_its_record_is_drawn(tmp_path: Path) -> None:
    record = {"dataset": "charades_train", "video": "v.mp4", "problem": "x", "solution": [0, 0.5]}
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record] * 3))
    asked = []

    def header_duration_s(video: str) -> float:
        asked.append(video)
        if len(asked) > 1:
            raise VideoError("is empty; replace it.", "empty")
        return 20.0

    samples = open_pool([source_of(path, "temporal_r1")], 1, header_duration_s)
    assert not asked  # no video is opened at the start
    good = samples[1]
    assert good.intervals_s == ((0.0, 10.0),) and good.id == "v.mp4/1"
    bad = samples[2]
    assert bad == Problem(
        sample="v.mp4/2",
        video="/data/v.mp4",
        kind="empty",
        reason="/data/v.mp4 is empty; replace it.",
    )


@pytest.mark.slow
def test_half_a_million_samples_index_in_seconds_and_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    with open(path, "w") as file:
        for number in range(490_000):
            start = ",\n" if number else "["
            file.write(start + json.dumps(RECORD | {"id": str(number)}))
        file.write("]")
    program = f"""
import resource, time
from megatron_vrl.config import Source
from megatron_vrl.data.mix import SampleStream, open_pool

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before, start = held(), time.process_time()
source = Source(json_path={str(path)!r}, data_folder="/data", format="multiple_choice")
pool = open_pool([source], seed=1)
stream = SampleStream(pool, seed=1)
stream.take(16)
seconds, held_then = time.process_time() - start, held()
for _ in range(200):
    stream.take(100)  # a step's samples; drawn ones are not kept
print(len(pool), seconds, held_then - before, held() - held_then)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, seconds, held, grown = map(float, done.stdout.split())
    print(f"{path.stat().st_size / 1e6:.0f} MB, {seconds:.1f} s, {held / 1e6:.0f} MB held")
    assert found == 490_000
    assert seconds < 20 and held < 64e6 and grown < 8e6
