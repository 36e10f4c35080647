"""Sample files of lmms-eval: read by the index and checked by the target, and written."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.errors import DataError
from megatron_vrl.evaluation.benchmark import (
    items_of,
    questions,
    read_predictions,
    write_lmms_samples,
)
from megatron_vrl.evaluation.protocols import Prediction, Protocol
from megatron_vrl.types import Sample
from tests.data.formats.test_benchmarks import VIDEO_MME

CAPTIONS = {
    "v": {"duration": 30.0, "timestamps": [[2.0, 9.5], [20.0, 34.0]], "sentences": ["a", "b"]}
}
TIMES = '<think>x</think><answer>{"start_time": "20.0", "end_time": "34.0"}</answer>'


def asked(folder: Path, name: str, protocol: Protocol = "strict") -> list[Sample]:
    path = folder / "annotations.json"
    path.write_text(json.dumps(CAPTIONS if name == "charades_sta" else VIDEO_MME))
    return questions(name, str(path), "", protocol)


def read(folder: Path, name: str, row: Any, protocol: Protocol = "strict") -> Prediction:
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (prediction,) = read_predictions(folder / "samples.jsonl", asked(folder, name, protocol))
    return prediction


@pytest.mark.parametrize(
    "responses",
    [
        {"filtered_resps": [TIMES]},
        {"filtered_resps": TIMES},  # flattened
        {"resps": [[TIMES]], "filtered_resps": ["stripped of its thinking"]},
        {"resps": [TIMES], "filtered_resps": "stripped"},
    ],
)
@pytest.mark.parametrize("protocol", ["strict", "clipped"])
def test_the_text_with_its_thinking_is_read(
    responses: dict[str, Any], protocol: Protocol, tmp_path: Path
) -> None:
    row = {"doc_id": 1, "target": "[20.0, 34.0]", "doc_hash": "0", "input": "?"} | responses
    prediction = read(tmp_path, "charades_sta", row, protocol)
    assert (prediction.id, prediction.response) == ("v/1", TIMES)


@pytest.mark.parametrize("target", ["C", "(C)", "C. 5.", "5."])
def test_a_target_names_the_option(target: str, tmp_path: Path) -> None:
    row = {"doc_id": 0, "target": target, "filtered_resps": ["C"]}
    assert read(tmp_path, "video_mme", row).id == "001-1"


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("charades_sta", {"doc_id": 2}, "'doc_id' is 2, expected the index of one of 2 questions"),
        ("charades_sta", {"doc_id": "1"}, "'doc_id' is '1', expected the index"),
        (
            "charades_sta",
            {"doc_id": 0, "target": "[20.0, 34.0]"},
            "is not the truth of question 'v/0', number 0 of the annotations: give the same split",
        ),
        ("video_mme", {"doc_id": 0, "target": "B"}, "is not the truth of question '001-1'"),
        ("video_mme", {"doc_id": 0, "target": "C"}, "neither 'resps' nor 'filtered_resps' holds a"),
    ],
)
def test_what_is_wrong_is_named(
    name: str, row: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, name, row)
    assert str(error.value).startswith(f"{tmp_path / 'samples.jsonl'}, line 1: ")
    assert sentence in str(error.value)


def test_a_written_file_is_read_again(tmp_path: Path) -> None:
    samples = asked(tmp_path, "charades_sta")
    predictions = [Prediction(id="v/0", response="unclear"), Prediction(id="v/1", response=TIMES)]
    items = items_of("charades_sta", samples, predictions, "strict")
    path = tmp_path / "new" / "20260101_samples_charades.jsonl"
    write_lmms_samples(path, "charades_sta", items)
    assert read_predictions(path, samples) == predictions
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1]
    assert rows[1]["target"] == "[20.0, 34.0]" and rows[1]["score"] == rows[1]["r1@0.7"] == 1.0
    assert '"b"' in rows[1]["input"] and rows[0]["score"] == 0.0
