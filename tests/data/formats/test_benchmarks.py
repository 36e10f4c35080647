"""Benchmark formats: synthetic records of each format and the expected samples."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Source
from megatron_vrl.data.formats.benchmarks import BENCHMARK_READERS
from megatron_vrl.data.formats.records import option_texts
from megatron_vrl.data.formats.training import read, read_whole
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS

TVGBENCH = [
    {
        "path": "./dataset/videos/AB1CD.mp4",
        "question": "a person sits down.",
        "answer": "13.4-28.1",
        "duration": 27.5,
        "dataset_name": "charades",
        "qsemtype": "Human Pose",
        "start": None,
    }
]
RTL = [
    {
        "question_id": 7,
        "vid": "xYz",
        "question": "When does she jump?",
        "answer": "<20.5> <9.> She bends her knees before.",
        "duration": 60.1,
    }
]
MVBENCH = {
    "action_sequence": [
        {"video": "a.mp4", "question": "What then?", "candidates": ["Sat.", "Ran."],
         "answer": "Ran.", "start": 1.0, "end": 2.0},
        {"video": "a.mp4", "question": "And then?", "candidates": ["Sat.", "Ran."],
         "answer": "Sat."},
    ],
    "state_change": [
        {"video": "a.mp4", "question": "Is it lit?", "candidates": ["on", "off", "unknown"],
         "answer": "off"},
    ],
}  # fmt: skip
TEMPCOMPASS = {
    "multi-choice": {
        "12": {
            "action": [
                {
                    "question": "What is it?\nA. run\nB. a long walk",
                    "answer": "B. a long walk",
                }
            ],
            "speed": [{"question": "How fast?\nA. slow\nB. 2x speed", "answer": "A. slow"}],
        }
    },
    "yes_no": {"12": {"action": [{"question": "Does she run?", "answer": "no"}]}},
    "caption_matching": {
        "12_reverse": {
            "order": [
                {
                    "question": "Which fits?\nOption 1: She sits.\nOption 2: She runs.",
                    "answer": "Option 2: She runs.",
                }
            ]
        }
    },
}
VIDEO_MME = [
    {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "History",
        "videoID": "fFj",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many?",
        "options": ["A. 3.", "B. 4.", "C. 5.", "D. 6."],
        "answer": "C",
    }
]
MMVU = [
    {
        "id": "validation_1",
        "video": "https://example.org/resolve/main/videos/Art/0.mp4",
        "question_type": "multiple-choice",
        "metadata": {"subject": "Art", "knowledge": []},
        "question": "Which shot is it?",
        "choices": {"A": "zoom", "B": "dolly", "C": "pan", "D": "tilt", "E": "cut"},
        "answer": "B",
    },
    {
        "id": "validation_2",
        "video": "https://example.org/resolve/main/videos/Art/1.mp4",
        "question_type": "open-ended",
        "metadata": {"subject": "Art"},
        "question": "Which technique?",
        "choices": {"A": "", "B": "", "C": "", "D": "", "E": ""},
        "answer": "Dolly zoom",
    },
]
RECORDS: dict[str, Any] = {
    "tvgbench": TVGBENCH,
    "activitynet_rtl": RTL,
    "mvbench": MVBENCH,
    "tempcompass": TEMPCOMPASS,
    "video_mme": VIDEO_MME,
    "mmvu": MMVU,
}


def source_of(
    form: Any,
    folder: Path,
    records: Any = None,
) -> Source:
    """Write the records as the benchmark is released: one file, or one file per part."""
    records = RECORDS[form] if records is None else records
    if BENCHMARK_READERS[form].by_file:
        for name, content in records.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return Source(json_path=str(folder), data_folder="/data", format=form)
    (folder / "all.json").write_text(json.dumps(records))
    return Source(json_path=str(folder / "all.json"), data_folder="/data", format=form)


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        ("tvgbench", [("AB1CD.mp4/0", "AB1CD.mp4", ((13.4, 27.5),), "")]),
        ("activitynet_rtl", [("7", "v_xYz.mp4", ((9.0, 20.5),), "")]),
        (
            "mvbench",
            [
                ("a.mp4/0", "star/Charades_segment/a.mp4", (), "B"),
                ("a.mp4/1", "star/Charades_segment/a.mp4", (), "A"),
                ("a.mp4/2", "perception/videos/a.mp4", (), "B"),
            ],
        ),
        (
            "tempcompass",
            [
                ("12_reverse/0", "12_reverse.mp4", (), "B"),
                ("12/0", "12.mp4", (), "B"),
                ("12/1", "12.mp4", (), "A"),
                ("12/2", "12.mp4", (), "B"),
            ],
        ),
        ("video_mme", [("001-1", "fFj.mp4", (), "C")]),
        ("mmvu", [("validation_1", "Art/0.mp4", (), "B")]),
    ],
)
def test_each_format_gives_the_expected_sample(
    form: str, rows: list[tuple[str, str, tuple[tuple[float, float], ...], str]], tmp_path: Path
) -> None:
    samples = read(source_of(form, tmp_path))
    assert [
        (s.id, s.first_path.removeprefix("/data/"), s.intervals_s, s.option) for s in samples
    ] == rows
    for sample in samples:
        assert TASKS[sample.task].parse(TASKS[sample.task].target(sample), sample).formatted


def test_every_format_is_tested_here() -> None:
    assert set(RECORDS) == set(BENCHMARK_READERS)


def test_options_and_labels(tmp_path: Path) -> None:
    walk, slow, no = read(source_of("tempcompass", tmp_path))[1:]
    assert (walk.query, walk.options) == ("What is it?", ("run", "a long walk"))
    assert slow.labels == ("dimension/speed", "form/multi-choice")
    assert (no.query, no.options, no.option) == ("Does she run?", ("yes", "no"), "B")
    (sample,) = read(source_of("video_mme", tmp_path))
    assert sample.options == ("3.", "4.", "5.", "6.")
    assert sample.labels == ("duration/short", "domain/Knowledge", "task_type/Counting Problem")


def test_one_file_of_several(tmp_path: Path) -> None:
    (tmp_path / "state_change.json").write_text(json.dumps(MVBENCH["state_change"]))
    path = tmp_path / "state_change.json"
    (sample,) = read(Source(json_path=str(path), data_folder="", format="mvbench"))
    assert sample.labels == ("sub_task/state_change",)
    with pytest.raises(DataError, match="Cannot read the annotations"):
        read(Source(json_path=str(tmp_path.parent / "x"), data_folder="", format="mvbench"))


@pytest.mark.parametrize("alone", [True, False])
def test_captions_are_rejected_because_they_need_a_judge(alone: bool, tmp_path: Path) -> None:
    question = "Which fits?\nInformation A: {'action': 'sit'}\nGenerated Caption:"
    content = {"12": {"action": [{"question": question, "answer": "A. sit"}]}}
    (tmp_path / "captioning.json").write_text(json.dumps(content))
    (tmp_path / "yes_no.json").write_text(json.dumps(TEMPCOMPASS["yes_no"]))
    path = tmp_path / "captioning.json" if alone else tmp_path
    with pytest.raises(DataError, match=r"captioning\.json asks for free captions, which a"):
        read(Source(json_path=str(path), data_folder="", format="tempcompass"))


def test_an_evaluation_gets_every_question_uncut(tmp_path: Path) -> None:
    assert [sample.id for sample in read_whole(source_of("mmvu", tmp_path))] == [
        "validation_1",
        "validation_2",
    ]
    (sample,) = read_whole(source_of("tvgbench", tmp_path))
    assert sample.intervals_s == ((13.4, 28.1),)


@pytest.mark.parametrize(
    ("form", "changed", "sentence"),
    [
        ("tvgbench", {"answer": "13 to 28"}, "is '13 to 28', expected times such as"),
        ("activitynet_rtl", {"answer": "<3> only"}, "is '<3> only', expected two times such as"),
        ("video_mme", {"answer": "E"}, "is 'E', expected the letter of one of 4 options."),
        ("mmvu", {"metadata": {}}, "record 0: field 'metadata.subject' is missing."),
    ],
)
def test_what_is_wrong_is_named(
    form: str, changed: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read(source_of(form, tmp_path, [RECORDS[form][0] | changed]))
    assert sentence in str(error.value)


def test_a_candidate_of_mvbench_may_be_a_letter(tmp_path: Path) -> None:
    record = {"video": "a.mp4", "question": "Which?", "candidates": ["b", "a", "d"], "answer": "b"}
    (sample,) = read(source_of("mvbench", tmp_path, {"character_order": [record]}))
    assert (sample.options, sample.option) == (("b", "a", "d"), "A")


NAMES = ("E. coli", "C. elegans", "S. cerevisiae", "(R) label")


@pytest.mark.parametrize("form", ["multiple_choice", "mvbench", "tempcompass", "video_mme", "mmvu"])
@pytest.mark.parametrize("style", ["{}. {}", "{}) {}", "({}) {}", "({}){}", "{}: {}", "{1}"])
def test_only_an_options_own_letter_is_removed(form: Any, style: str, tmp_path: Path) -> None:
    lettered = [style.format(letter, name) for letter, name in zip("ABCD", NAMES, strict=True)]
    if form == "tempcompass" and style == "{1}":
        return  # without letters its lines are no options
    choice = {"id": "1", "video": "a.mp4", "question": "Which?", "duration": 9.0}
    records = {
        "multiple_choice": [choice | {"options": lettered, "answer": "B"}],
        "mvbench": {
            "state_change": [
                {"video": "a.mp4", "question": "?", "candidates": lettered, "answer": lettered[1]}
            ]
        },
        "tempcompass": {
            "multi-choice": {
                "1": {
                    "action": [
                        {"question": "\n".join(["Which?", *lettered]), "answer": lettered[1]}
                    ]
                }
            }
        },
        "video_mme": [VIDEO_MME[0] | {"options": lettered, "answer": "B"}],
        "mmvu": [MMVU[0] | {"choices": dict(zip("ABCD", lettered, strict=True)), "answer": "B"}],
    }[form]
    if form == "multiple_choice":
        (tmp_path / "all.json").write_text(json.dumps(records))
        source = Source(json_path=str(tmp_path / "all.json"), data_folder="/data", format=form)
    else:
        source = source_of(form, tmp_path, records)
    (sample,) = read(source)
    assert (sample.options, sample.option) == (NAMES, "B")
    assert sample.rationale == "C. elegans"


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["A. red", "C. blue"], ["A. red", "C. blue"]),  # not in order
        (["A. red", "blue"], ["A. red", "blue"]),  # not every one
        (["A. red", "B) blue"], ["A. red", "B) blue"]),  # two styles
        (["A.M.", "B.C."], ["A.M.", "B.C."]),
        (["A", "B"], ["A", "B"]),
        (["A. ", "B. "], ["A.", "B."]),
        ([" a. red ", "b. blue"], ["red", "blue"]),
        (["Option 1: A. red", "Option 2: B. blue"], ["A. red", "B. blue"]),
    ],
)
def test_letters_are_removed_from_all_options_or_none(options: list[str], texts: list[str]) -> None:
    assert option_texts(options) == tuple(texts)
