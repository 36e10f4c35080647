"""NExT-GQA's CSV: a synthetic excerpt in the released layout equals the JSON list."""

import json
from pathlib import Path

import pytest

from megatron_vrl.config import Source
from megatron_vrl.data.formats.training import read, read_whole
from megatron_vrl.errors import DataError

CSV = """video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
2574,719,320,240,what did the cat do,"lie, then nap",8,TN,run,eat,"lie, then nap",sit,hop
3083,1420,640,480,why did it rain,clouds,3,CW,clouds,wind,snow,sun,clouds
3083,1420,640,480,why did it stop,sun,4,CW,clouds,wind,snow,sun,fog
"""
GSUB = {
    "2574": {"duration": 30, "location": {"8": [[23.0, 27.7]], "1": [[0.0, 2.0]]}, "fps": 23.98},
    "3083": {"duration": 47, "location": {"3": [[1.5, 4], [9.0, 12.0]]}, "fps": 30},
}
RECORDS = [
    {
        "id": "2574_8",
        "video": "1101/2574.mp4",
        "question": "what did the cat do",
        "options": ["(A) run", "(B) eat", "(C) lie, then nap", "(D) sit", "(E) hop"],
        "duration": 30,
        "glue": [[23.0, 27.7]],
        "type": "TN",
        "answer": "(C)",
    },
    {
        "id": "3083_3",
        "video": "3083.mp4",
        "question": "why did it rain",
        "options": ["(A) clouds", "(B) wind", "(C) snow", "(D) sun", "(E) clouds"],
        "duration": 47,
        "glue": [[1.5, 4], [9.0, 12.0]],
        "type": "CW",
        "answer": "(A)",
    },
]


@pytest.fixture
def released(tmp_path: Path) -> Path:
    (tmp_path / "test.csv").write_text(CSV)
    (tmp_path / "gsub_test.json").write_text(json.dumps(GSUB))
    (tmp_path / "map_vid_vidorID.json").write_text(json.dumps({"2574": "1101/2574"}))
    return tmp_path


def source(path: Path) -> Source:
    return Source(json_path=str(path), data_folder="/data", format="next_gqa")


def test_the_released_csv_equals_the_json_list(released: Path) -> None:
    (released / "list.json").write_text(json.dumps(RECORDS))
    found = read_whole(source(released / "test.csv"))
    assert found[:2] == read_whole(source(released / "list.json"))
    assert found[2].intervals_s == () and found[2].id == "3083_4"  # no location, never asked
    assert [s.id for s in read(source(released / "test.csv"))] == ["2574_8", "3083_3"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("test.csv", CSV.replace(",clouds,3", ",cloud,3"), "line 3: field 'answer' is 'cloud'"),
        ("test.csv", CSV.replace(",a4\n", "\n"), "line 2: no field 'a4'"),
        ("gsub_test.json", json.dumps({"2574": GSUB["2574"]}), "has no video '3083'"),
        ("gsub_test.json", json.dumps({k: v | {"duration": 0} for k, v in GSUB.items()}),
         "field 'duration' is 0, refused"),
        ("gsub_test.json", "[]", "holds a list, expected an object"),
        ("gsub_test.json", "{", "is not JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(released: Path, name: str, content: str, sentence: str) -> None:
    (released / name).write_text(content)
    with pytest.raises(DataError) as refused:
        read(source(released / "test.csv"))
    assert sentence in str(refused.value)


def test_a_missing_intervals_file_is_an_error(released: Path) -> None:
    (released / "gsub_test.json").unlink()
    with pytest.raises(DataError, match=r"gsub_test\.json is missing: .* needs this file"):
        read(source(released / "test.csv"))
