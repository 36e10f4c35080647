"""Formats of TimeLens, QVHighlights, LVBench, MLVU and subtitles: records written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Source
from megatron_vrl.data.formats.long_videos import LONG_VIDEO_READERS
from megatron_vrl.data.formats.moment_retrieval import MOMENT_READERS
from megatron_vrl.data.formats.training import READERS, check_format, read, read_whole
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Sample
from tests.data.formats.test_benchmarks import VIDEO_MME

BENCH = {"AB": {"duration": 31.5, "spans": [[0.0, 8.5], [20.0, 33.0]],
                "queries": ["A man  sits. ", "He stands"]}}  # fmt: skip
TIMELENS = [
    {"video_path": "cosmo/a.mp4", "duration": 90.0, "source": "cosmo_cap",
     "events": [{"query": "A dog runs.", "span": [[4, 9.5]]},
                {"query": "A cat sleeps", "span": [[1.0, 2.0], [50.0, 60.0]]}]},
    {"video_path": "frames/b", "duration": 40.0, "query": "It rains", "span": [3.0, 5.0]},
]  # fmt: skip
QVH = [
    {"qid": 12, "query": "A girl cooks.", "duration": 150, "vid": "x_0.0_150.0",
     "relevant_clip_ids": [0, 1], "saliency_scores": [[1, 2, 3], [1, 2, 3]],
     "relevant_windows": [[0, 4], [82, 150]]},
]  # fmt: skip
LVBENCH = [
    {"key": "Cm7", "type": "cartoon",
     "video_info": {"duration_minutes": 45.5, "fps": 30.0},
     "qa": [{"uid": "7", "question": "Who opens it?\n(A) the cook\n(B) the cat\n(C) nobody",
             "answer": "B", "question_type": ["entity recognition", "event understanding"],
             "time_reference": "00:15-00:19"}]},
]  # fmt: skip
MLVU: dict[str, Any] = {
    "4_count": [
        {"video": "c.mp4", "duration": 572.8, "question": "How often?", "question_type": "count",
         "candidates": ["2", "1", "5"], "answer": "1"},
    ],
    "1_plotQA": [
        {"video": "m.mp4", "duration": 246, "question": "Which colour?", "question_type": "plotQA",
         "candidates": ["Red", "Blue", "Red"], "answer": "Red"},
        {"video": "m.mp4", "duration": 246, "question": "Which one?", "question_type": "plotQA",
         "candidates": ["Red", "Blue"], "answer": "Green"},
    ],
    "9_summary": [
        {"video": "s.mp4", "duration": 480.0, "question": "Please summarize this video.",
         "answer": "Waves, then a boat.", "question_type": "summary"},
    ],
}  # fmt: skip
SUBTITLE = (
    "1\r\n00:00:01,000 --> 00:00:02,500\r\n"
    '<font color="white" size=".72c">Hello</font>\r\nthere\r\n\r\n'
    "2\r\n00:00:03,000 --> 00:00:04,000\r\n\r\n\r\n"
    "3\r\n00:00:05,000 --> 00:00:06,000\r\nGood bye\r\n"
)
RECORDS: dict[str, Any] = {
    "timelens_bench": BENCH,
    "timelens": TIMELENS,
    "qvhighlights": QVH,
    "lvbench": LVBENCH,
    "mlvu": MLVU,
    "video_mme_subtitles": VIDEO_MME,
}


def source_of(form: Any, folder: Path, records: Any = None) -> Source:
    """Write the records in the files in which the set is released."""
    records = RECORDS[form] if records is None else records
    path = folder / f"{form}.json"
    if READERS[form].by_file:
        path = folder / form
        path.mkdir()
        for name, content in records.items():
            (path / f"{name}.json").write_text(json.dumps(content))
    elif form in ("timelens", "qvhighlights", "lvbench"):
        path = folder / f"{form}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    if form == "video_mme_subtitles":
        (folder / "subtitle").mkdir(exist_ok=True)
        (folder / "subtitle/fFj.srt").write_text(SUBTITLE)
    return Source(json_path=str(path), data_folder="/data", format=form)


def row(sample: Sample) -> tuple[Any, ...]:
    name = sample.first_path.removeprefix("/data/")
    return sample.id, name, sample.duration_s, sample.query, sample.intervals_s, sample.option


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        (
            "timelens_bench",
            [
                ("AB/0", "AB.mp4", 31.5, "A man sits", ((0.0, 8.5),), ""),
                ("AB/1", "AB.mp4", 31.5, "He stands", ((20.0, 33.0),), ""),
            ],
        ),
        (
            "timelens",
            [
                ("cosmo/a.mp4/0.0", "cosmo/a.mp4", 90.0, "A dog runs", ((4, 9.5),), ""),
                (
                    *("cosmo/a.mp4/0.1", "cosmo/a.mp4", 90.0, "A cat sleeps"),
                    *(((1.0, 2.0), (50.0, 60.0)), ""),
                ),
                ("frames/b/1.0", "frames/b.mp4", 40.0, "It rains", ((3.0, 5.0),), ""),
            ],
        ),
        (
            "qvhighlights",
            [("12", "x_0.0_150.0.mp4", 150, "A girl cooks.", ((0, 4), (82, 150)), "")],
        ),
        ("lvbench", [("7", "Cm7.mp4", 2730.0, "Who opens it?", (), "B")]),
        (
            "mlvu",
            [
                ("m.mp4/0", "1_plotQA/m.mp4", 246, "Which colour?", (), "C"),  # the last that fits
                ("m.mp4/1", "1_plotQA/m.mp4", 246, "Which one?", (), "@"),  # no answer is right
                ("c.mp4/0", "4_count/c.mp4", 572.8, "How often?", (), "B"),
                ("s.mp4/0", "9_summary/s.mp4", 480.0, "Please summarize this video.", (), ""),
            ],
        ),
        (
            "video_mme_subtitles",
            [
                (
                    *("001-1", "fFj.mp4", 0.0),
                    "This video's subtitles are listed below:\nHello there\nGood bye\nHow many?",
                    *((), "C"),
                )
            ],
        ),
    ],
)
def test_each_format_gives_the_expected_samples(
    form: str, rows: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    source = source_of(form, tmp_path)
    check_format(source)
    samples = read_whole(source)
    assert [row(sample) for sample in samples] == rows
    for sample in samples:
        if sample.options and sample.option != "@":
            parsed = TASKS[sample.task].parse(TASKS[sample.task].target(sample), sample)
            assert parsed.option == sample.option


def test_training_reads_them_cut_to_the_video(tmp_path: Path) -> None:
    assert read(source_of("timelens_bench", tmp_path))[1].intervals_s == ((20.0, 31.5),)
    assert len(read(source_of("timelens", tmp_path))) == 3
    assert [s.id for s in read(source_of("lvbench", tmp_path))] == ["7"]


def test_every_format_is_tested_here() -> None:
    assert set(RECORDS) == set(MOMENT_READERS) | set(LONG_VIDEO_READERS)


def test_labels(tmp_path: Path) -> None:
    assert read_whole(source_of("timelens", tmp_path))[0].labels == ("source/cosmo_cap",)
    assert read_whole(source_of("mlvu", tmp_path))[2].labels == ("task/count",)
    assert read_whole(source_of("lvbench", tmp_path))[0].labels == (
        *("type/cartoon", "ability/entity recognition", "ability/event understanding"),
    )


def test_windows_of_the_hidden_test_set_are_no_truth(tmp_path: Path) -> None:
    hidden = {key: QVH[0][key] for key in ("qid", "query", "duration", "vid")}
    (sample,) = read_whole(source_of("qvhighlights", tmp_path, [hidden]))
    assert sample.intervals_s == ()


@pytest.mark.parametrize(
    "text",
    ["Who?\n(A) the cook\n(B) a cat", "Who? (A) the cook (B) a cat", "Who?\nA. the cook\nB. a cat"],
)
def test_options_in_the_text_of_a_question(text: str, tmp_path: Path) -> None:
    record = LVBENCH[0] | {"qa": [{"uid": "7", "question": text, "answer": "B"}]}
    (sample,) = read_whole(source_of("lvbench", tmp_path, [record]))
    assert (sample.query, sample.options, sample.option) == ("Who?", ("the cook", "a cat"), "B")


def test_a_video_without_subtitles_has_none(tmp_path: Path) -> None:
    records = [VIDEO_MME[0] | {"videoID": "other"}]
    (sample,) = read_whole(source_of("video_mme_subtitles", tmp_path, records))
    assert "below:\nNo subtitles available\nHow many?" in sample.query


@pytest.mark.parametrize(
    ("form", "records", "sentence"),
    [
        (
            "timelens_bench",
            {"AB": BENCH["AB"] | {"queries": ["one"]}},
            "record 'AB' has 2 spans and 1 queries; expected one span for each query.",
        ),
        (
            "timelens_bench",
            {"AB": {"spans": [], "queries": []}},
            "record 'AB': field 'duration' is missing.",
        ),
        (
            "timelens",
            [{"video_path": "a.mp4", "duration": 9.0, "query": "x"}],
            "record 0 ('a.mp4') has no 'events' with a query and a span, and no 'query' with",
        ),
        ("timelens", [TIMELENS[1] | {"video_path": "/a.mp4"}], "is not inside the data folder"),
        ("qvhighlights", [QVH[0] | {"duration": 0}], "line 1: field 'duration' is 0, refused:"),
        (
            "lvbench",
            [LVBENCH[0] | {"qa": [{"uid": "7", "question": "Who?", "answer": "B"}]}],
            "record '7': field 'question' is 'Who?', expected its options (A), (B), ... after the",
        ),
        ("mlvu", {"4_count": [{"video": "c.mp4"}]}, "'0.duration' is missing."),
    ],
)
def test_what_is_wrong_is_named(form: str, records: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_whole(source_of(form, tmp_path, records))
    assert sentence in str(error.value)
    assert str(error.value).count("\n") == 0


def test_the_folder_of_subtitles_is_needed(tmp_path: Path) -> None:
    source = source_of("video_mme_subtitles", tmp_path)
    (tmp_path / "subtitle/fFj.srt").unlink()
    (tmp_path / "subtitle").rmdir()
    with pytest.raises(DataError, match=r"subtitle is missing: unpack Video-MME's subtitle\.zip"):
        read_whole(source)
