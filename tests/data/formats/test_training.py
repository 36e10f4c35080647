"""Training formats: expected samples, error messages, and excerpts of the released files."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Source
from megatron_vrl.data.formats.benchmarks import BENCHMARK_READERS
from megatron_vrl.data.formats.llamafactory import MEDIA_READERS
from megatron_vrl.data.formats.long_videos import LONG_VIDEO_READERS
from megatron_vrl.data.formats.moment_retrieval import MOMENT_READERS
from megatron_vrl.data.formats.training import READERS, read
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Sample, VideoClip

EXCERPTS = Path(os.environ.get("MVRL_ANNOTATIONS", "excerpts"))
CHARADES = {
    "3MSZA": {
        "duration": 30.96,
        "timestamps": [[24.3, 30.4], [20.0, 34.0]],
        "sentences": ["person turn a light on.", " person flips the switch."],
    },
    "AMT7R.webm": {"duration": 30, "timestamps": [[4.3, 12.5]], "sentences": ["a picture."]},
}
GQA = {
    "id": "2574374895_8",
    "video": "1101/2574374895.mp4",
    "question": "what did the baby do",
    "options": ["(A) clap proudly", "(B) the lady sitting down", "(C) lay on floor"],
    "duration": 30,
    "glue": [[23.0, 27.7], [1, 2]],
    "type": "TN",
    "answer": "(C)",
}
CHOICE = {name: value for name, value in GQA.items() if name != "glue"}
SEED = {
    "dataset": "activitynet",
    "video": "v_1.mp4",
    "problem": "a man turns the light on",
    "solution": [0.2, 0.5],
    "video_length": 30.0,
}


@pytest.fixture
def read_records(tmp_path: Path) -> Callable[..., list[Sample]]:
    def write_and_read(
        form: Any,
        records: dict[str, dict[str, Any]] | list[dict[str, Any] | int] | str,
        header_duration_s: Callable[[str], float] | None = None,
        suffix: str = ".json",
    ) -> list[Sample]:
        path = tmp_path / f"records{suffix}"
        path.write_text(records if isinstance(records, str) else json.dumps(records))
        source = Source(json_path=str(path), data_folder="/data", format=form)
        return read(source, header_duration_s)

    return write_and_read


def test_charades_sta(read_records: Callable[..., list[Sample]]) -> None:
    first, second, third = read_records("charades_sta", CHARADES)
    assert first == Sample(
        id="3MSZA/0",
        task="temporal_grounding",
        media=(VideoClip("/data/3MSZA.mp4"),),
        duration_s=30.96,
        query="person turn a light on.",
        rationale="person turn a light on.",
        intervals_s=((24.3, 30.4),),
        options=(),
        option="",
    )
    assert (second.id, second.query) == ("3MSZA/1", "person flips the switch.")
    assert second.intervals_s == ((20.0, 30.96),)  # runs past the end in the published file
    assert third.first_path == "/data/AMT7R.webm"


@pytest.mark.parametrize(
    "name", ["b.mov", "C.MP4", "d.flv", "e.m4v", "f.ts", "G.Mkv", "h.wmv", "i.mpg", "j.3gp"]
)
def test_a_name_with_a_video_ending_is_unchanged(
    read_records: Callable[..., list[Sample]], name: str
) -> None:
    record = {"duration": 16.0, "timestamps": [[1.0, 3.0]], "sentences": ["x"]}
    ids = {name: f"/data/{name}", f"{name}.part": f"/data/{name}.part.mp4", "v.2": "/data/v.2.mp4"}
    samples = read_records("charades_sta", dict.fromkeys(ids, record))
    assert [sample.first_path for sample in samples] == list(ids.values())


def test_next_gqa(read_records: Callable[..., list[Sample]]) -> None:
    (sample,) = read_records("next_gqa", [GQA])
    assert sample == Sample(
        id="2574374895_8",
        task="grounded_qa",
        media=(VideoClip("/data/1101/2574374895.mp4"),),
        duration_s=30.0,
        query="what did the baby do",
        rationale="lay on floor",
        intervals_s=((23.0, 27.7), (1.0, 2.0)),
        options=("clap proudly", "the lady sitting down", "lay on floor"),
        option="C",
        labels=("type/TN",),
    )


@pytest.mark.parametrize("answer", ["(C)", "C", "c", "lay on floor", "(C) lay on floor"])
def test_multiple_choice(read_records: Callable[..., list[Sample]], answer: str) -> None:
    (sample,) = read_records("multiple_choice", [CHOICE | {"answer": answer}])
    assert (sample.task, sample.option, sample.intervals_s) == ("multiple_choice", "C", ())
    assert sample.rationale == "lay on floor"


@pytest.mark.parametrize("form", ["charades_sta", "next_gqa", "temporal_r1"])
def test_a_clip_is_a_window_with_times_from_its_start(
    read_records: Callable[..., list[Sample]], form: str
) -> None:
    clip = {"clip": [4.0, 10.0]}
    records: Any = {
        "charades_sta": {"v": {"duration": 30.0, "timestamps": [[6, 12]], "sentences": ["x"]}},
        "next_gqa": [GQA | {"glue": [[6.0, 12.0]]}],
        "temporal_r1": [SEED],
    }[form]
    whole = read_records(form, records)
    given = {"v": records["v"] | clip} if form == "charades_sta" else [records[0] | clip]
    (sample,) = read_records(form, given)
    assert sample.window_s == (4.0, 10.0) and sample.duration_s == 6.0
    assert sample.intervals_s == ((2.0, 6.0),)
    assert whole[0].window_s is None and whole[0].first_path == sample.first_path
    wrong = {"clip": [4.0, 4.0]}
    given = {"v": records["v"] | wrong} if form == "charades_sta" else [records[0] | wrong]
    with pytest.raises(DataError, match=r"field 'clip' is \[4\.0, 4\.0\], expected"):
        read_records(form, given)


def test_temporal_r1(read_records: Callable[..., list[Sample]]) -> None:
    (sample,) = read_records("temporal_r1", [SEED])
    assert (sample.id, sample.task, sample.first_path) == (
        "v_1.mp4/0",
        "temporal_grounding",
        "/data/v_1.mp4",
    )
    assert (sample.query, sample.duration_s) == ("a man turns the light on", 30.0)
    assert sample.intervals_s == ((6.0, 15.0),)


def test_temporal_r1_is_asked_unmodified_when_the_problem_is_the_whole_question(
    read_records: Callable[..., list[Sample]],
) -> None:
    (plain,) = read_records("temporal_r1", [SEED])
    question = TASKS["temporal_grounding"].question(plain)
    (whole,) = read_records("temporal_r1", [SEED | {"problem": question}])
    assert TASKS["temporal_grounding"].question(whole) == question


def test_temporal_r1_reads_a_missing_length_from_the_video_once(
    read_records: Callable[..., list[Sample]],
) -> None:
    record = {name: SEED[name] for name in SEED if name != "video_length"}
    asked = []

    def header_duration_s(path: str) -> float:
        asked.append(path)
        return 20.0

    records = [record | {"dataset": "charades_train"}] * 3
    samples = read_records("temporal_r1", records, header_duration_s)
    assert [sample.intervals_s for sample in samples] == [((4.0, 10.0),)] * 3
    assert len({sample.id for sample in samples}) == 3
    assert asked == ["/data/v_1.mp4"]
    with pytest.raises(DataError) as error:
        read_records("temporal_r1", [record], header_duration_s)
    assert str(error.value).endswith(
        "records.json: record 0 has no field 'video_length' (seconds); it is read from the video "
        "only for the training set tagged 'charades_train', this record's tag is 'activitynet'."
    )


def test_jsonl_gives_the_same_samples(read_records: Callable[..., list[Sample]]) -> None:
    lines = "\n".join(json.dumps(record) for record in (GQA, GQA | {"id": "2"})) + "\n\n"
    samples = read_records("next_gqa", lines, suffix=".jsonl")
    assert samples == read_records("next_gqa", [GQA, GQA | {"id": "2"}])


def test_unusable_questions_are_skipped_with_a_warning(
    read_records: Callable[..., list[Sample]], caplog: pytest.LogCaptureFixture
) -> None:
    records = {
        "a": {"duration": 10.0, "timestamps": [[5, 5], [1, 2], [12, 14]], "sentences": ["x"] * 3},
        "b": {"duration": 10.0, "timestamps": [[1, 2], [-1, 2]], "sentences": [" ", "x"]},
    }
    with caplog.at_level(logging.WARNING):
        samples = read_records("charades_sta", records)
    assert [sample.id for sample in samples] == ["a/1", "b/1"]
    assert samples[1].intervals_s == ((0.0, 2.0),)
    assert caplog.messages[0].endswith(
        "3 of 5 questions left out, first 'a/0': no text, no interval within the video or no "
        "options."
    )


@pytest.mark.parametrize(
    ("form", "records", "sentence"),
    [
        ("charades_sta", "{", "records.json is not JSON: Expecting property name enclosed in "
         "double quotes: line 1 column 2 (char 1)."),
        ("charades_sta", '{"a": {}, "a": {}}', "records.json is not JSON: the key 'a' occurs "
         "twice in one object."),
        ("charades_sta", [], "records.json holds no sample."),
        ("charades_sta", {}, "records.json holds no sample."),
        ("next_gqa", {}, "records.json holds no sample."),
        ("next_gqa", [], "records.json holds no sample."),
        ("charades_sta", " ", "records.json is empty; give the annotations."),
        ("charades_sta", [1], "records.json does not look like charades_sta (an object): it holds "
         "a list. docs/tasks.md describes the formats."),
        ("next_gqa", {"a": 1}, "records.json does not look like next_gqa (a list): it holds an "
         "object. docs/tasks.md describes the formats."),
        ("mvbench", CHARADES, "records.json does not look like mvbench (a list); it looks like "
         "charades_sta."),
        ("temporal_r1", CHARADES, "records.json does not look like temporal_r1 (a list); it looks "
         "like charades_sta."),
        ("charades_sta", [GQA], "records.json does not look like charades_sta (an object); it "
         "looks like next_gqa or multiple_choice."),
        ("temporal_r1", [GQA], "records.json does not look like temporal_r1 (record 0: field "
         "'dataset' is missing); it looks like next_gqa or multiple_choice."),
        ("charades_sta", {"a": {"duration": 9, "timestamps": [[0, 1]], "sentences": [" "]}},
         "records.json holds no sample that can be asked: 1 question without "
         "text, without an interval within the video or without options."),
        ("next_gqa", [GQA, None], "records.json: record 1 is null, expected an object."),
        ("next_gqa", [GQA, GQA | {"id": ""}], "records.json: record 1: field 'id' is '', refused: "
         "String should have at least 1 character."),
        ("next_gqa", [GQA, GQA | {"video": ["a.mp4"]}], "records.json: record 1: field 'video' is "
         "['a.mp4'], refused: Input should be a valid string."),
        ("next_gqa", [GQA | {"video": "a\0.mp4"}], "records.json: record '2574374895_8': video "
         "'a\\x00.mp4' holds a NUL character, which no file name may."),
        ("charades_sta", {"a": {"timestamps": [], "sentences": []}},
         "records.json: record 'a': field 'duration' is missing."),
        ("charades_sta", {"a": {"duration": "30", "timestamps": [], "sentences": []}},
         "records.json: record 'a': field 'duration' is '30', refused: "
         "Input should be a valid number."),
        ("charades_sta", {"a": {"duration": 0, "timestamps": [], "sentences": []}},
         "records.json: record 'a': field 'duration' is 0, refused: "
         "Input should be greater than 0."),
        ("charades_sta", {"a": {"duration": 9, "timestamps": [[1]], "sentences": ["x"]}},
         "records.json: record 'a': field 'timestamps.0' is [1], refused: List should have at "
         "least 2 items after validation, not 1."),
        ("charades_sta", {"a": {"duration": 9, "timestamps": [[1, 2]], "sentences": []}},
         "records.json: record 'a' has 1 timestamp and 0 sentences; expected one sentence for "
         "each."),
        ("charades_sta", {"../a": {"duration": 9, "timestamps": [], "sentences": []}},
         "records.json: record '../a': video '../a.mp4' is not inside the data folder '/data'; "
         "expected a path relative to it."),
        ("next_gqa", [GQA, GQA | {"video": "/etc/a.mp4"}],
         "records.json: record '2574374895_8': video '/etc/a.mp4' is not inside the data folder "
         "'/data'; expected a path relative to it."),
        ("multiple_choice", [CHOICE | {"video": "x/../../a.mp4"}],
         "records.json: record '2574374895_8': video 'x/../../a.mp4' is not inside the data "
         "folder '/data'; expected a path relative to it."),
        ("next_gqa", [GQA, CHOICE], "records.json: record 1: field 'glue' is missing."),
        ("next_gqa", [CHOICE], "records.json does not look like next_gqa (record 0: field 'glue' "
         "is missing); it looks like multiple_choice."),
        ("next_gqa", [GQA, GQA | {"options": ["(A) x"]}],
         "records.json: record 1: field 'options' is ['(A) x'], refused: List should have at "
         "least 2 items after validation, not 1."),
        ("next_gqa", [GQA | {"answer": "(F)"}],
         "records.json: record '2574374895_8': field 'answer' is '(F)', expected the letter of "
         "one of 3 options."),
        ("temporal_r1", [SEED | {"solution": "0.2-0.5"}],
         "records.json: record 0: field 'solution' is '0.2-0.5', refused: Input should be a "
         "valid list."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    read_records: Callable[..., list[Sample]],
    form: str,
    records: dict[str, Any] | list[dict[str, Any] | int | None] | str,
    sentence: str,
) -> None:
    with pytest.raises(DataError) as error:
        read_records(form, records)
    assert str(error.value).endswith("/" + sentence)


def test_a_missing_file_is_an_error() -> None:
    source = Source(json_path="/nowhere/a.json", data_folder="/", format="charades_sta")
    with pytest.raises(DataError) as error:
        read(source)
    assert str(error.value) == (
        "Cannot read the annotations /nowhere/a.json: No such file or directory."
    )


@pytest.mark.skipif(not EXCERPTS.is_dir(), reason="set MVRL_ANNOTATIONS to the published excerpts")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("charades_sta_train_first40", "charades_sta"),
        ("charades_sta_test_first40", "charades_sta"),
        ("activitynet_captions_val2_first30", "charades_sta"),
        ("nextgqa_test_first40", "next_gqa"),
        ("nextgqa_test_first40", "multiple_choice"),
        ("tvgbench_first30", "tvgbench"),
    ],
)
def test_excerpts_of_released_files_are_read(name: str, form: Any) -> None:
    path = EXCERPTS / f"{name}.json"
    samples = read(Source(json_path=str(path), data_folder="/data", format=form))
    records = json.loads(path.read_text())
    num_questions = (
        sum(len(record["sentences"]) for record in records.values())
        if isinstance(records, dict)
        else len(records)
    )
    assert len(samples) == len({sample.id for sample in samples}) == num_questions
    for sample in samples:
        task = TASKS[sample.task]
        assert task.parse(task.target(sample), sample).formatted
        assert all(0 <= s < e <= sample.duration_s for s, e in sample.intervals_s)


def test_every_format_is_tested_here() -> None:
    here = {"charades_sta", "next_gqa", "multiple_choice", "temporal_r1"}
    elsewhere = {**BENCHMARK_READERS, **MOMENT_READERS, **LONG_VIDEO_READERS}
    elsewhere |= MEDIA_READERS  # test_row_formats.py
    assert set(READERS) == here | {"generic"} | set(elsewhere)  # test_generic.py
