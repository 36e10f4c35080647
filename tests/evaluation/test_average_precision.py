"""Average precision of moment retrieval: worked by hand, and from a submission to QVHighlights."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.evaluation.average_precision import (
    Window,
    average_precision,
    average_precisions,
)
from megatron_vrl.evaluation.benchmark import items_of, questions, read_predictions
from megatron_vrl.evaluation.protocols import BENCHMARKS, Protocol, summary
from megatron_vrl.types import Interval

FIRST, SECOND, MISS = (0.0, 10.0), (50.0, 60.0), (100.0, 110.0)


@pytest.mark.parametrize(
    ("windows", "truths", "expected"),
    [
        ([(*FIRST, 0.9)], [FIRST], 1.0),
        ([], [FIRST], 0.0),
        ([(*MISS, 0.9), (*FIRST, 0.1)], [FIRST], 1 / 2),  # second in rank
        ([(*MISS, 0.1), (*FIRST, 0.9)], [FIRST], 1.0),  # sorted by score
        ([(*FIRST, 0.9), (*FIRST, 0.8)], [FIRST, SECOND], 1 / 2),  # a truth is taken once
        ([(*FIRST, 0.9), (*MISS, 0.8), (*SECOND, 0.7)], [FIRST, SECOND], (1 + 2 / 3) / 2),
        ([(*MISS, 0.9), (*FIRST, 0.8), (*SECOND, 0.7)], [FIRST, SECOND], (2 / 3 + 2 / 3) / 2),
        ([(*MISS, 0.9)] * 10 + [(*FIRST, 0.8)], [FIRST], 0.0),  # the eleventh is not evaluated
        ([(5.0, 5.0, 0.9)], [(5.0, 5.0)], 0.0),  # no length
    ],
)
def test_average_precision(windows: list[Window], truths: list[Interval], expected: float) -> None:
    assert average_precision(windows, truths, 0.5) == pytest.approx(expected)


def test_the_best_free_interval_is_taken() -> None:
    """The first window fits both truths, the second only the one that the first likes less."""
    windows = [(0.0, 10.0, 0.9), (0.0, 14.0, 0.8)]
    assert average_precision(windows, [(0.0, 14.0), (0.0, 11.0)], 0.7) == 1.0


def test_thresholds_and_lengths() -> None:
    values = average_precisions([(0.0, 10.0, 1.0)], [(0.0, 16.0), (80.0, 84.0)])  # IoU 0.625
    assert values["map@0.5"] == 0.5 and values["map@0.75"] == 0.0
    assert values["map"] == pytest.approx(0.5 * 3 / 10)  # 0.5, 0.55 and 0.6
    assert values["map_middle"] == pytest.approx(3 / 10) and values["map_short"] == 0.0
    assert "map_long" not in values


QVH = [
    {"qid": 1, "query": "a", "duration": 150, "vid": "x", "relevant_windows": [[0, 10], [50, 60]]},
    {"qid": 2, "query": "b", "duration": 150, "vid": "y", "relevant_windows": [[100, 150]]},
    {"qid": 3, "query": "c", "duration": 150, "vid": "z", "relevant_windows": [[8, 9]]},
]


def evaluated(
    tmp_path: Path, rows: list[dict[str, Any]], protocol: Protocol, multi_segment: bool = False
) -> dict[str, Any]:
    (tmp_path / "gt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QVH))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    annotations = str(tmp_path / "gt.jsonl")
    samples = questions("qvhighlights", annotations, "", protocol, multi_segment)
    predictions = read_predictions(tmp_path / "p.jsonl", samples)
    found = summary(
        BENCHMARKS["qvhighlights"], items_of("qvhighlights", samples, predictions, protocol)
    )
    values: dict[str, Any] = {name: row["value"] for name, row in found["metrics"].items()}
    values.update(found["failures"])
    return values


def test_a_submission_and_an_answer_in_text(tmp_path: Path) -> None:
    body = json.dumps({"start_time": "100", "end_time": "160"})
    rows: list[dict[str, Any]] = [
        {"qid": 1, "vid": "x", "pred_relevant_windows": [[50, 60, 0.4], [0, 10, 0.9]]},
        {"id": "2", "response": f"<think></think><answer>{body}</answer>"},
    ]
    found = evaluated(tmp_path, rows, "strict")
    assert found["missing"] == 1  # question 3 counts in every mean
    assert found["r1@0.5"] == pytest.approx(2 / 3)  # the first window listed is the answer
    assert found["miou"] == pytest.approx((1 + 50 / 60) / 3)
    assert found["map@0.75"] == pytest.approx(2 / 3)
    assert found["map"] == pytest.approx((1 + 7 / 10) / 3)  # 50 / 60 reaches 0.8
    assert found["map_short"] == pytest.approx((1 + 0) / 2)
    assert found["map_long"] == pytest.approx(7 / 10)
    assert "map_middle" not in found
    rows[1] = {"qid": 2, "pred_relevant_windows": [[100, 160, 1.0]]}
    assert evaluated(tmp_path, rows, "clipped")["map_long"] == 1.0


def test_a_set_of_intervals_in_text(tmp_path: Path) -> None:
    """Each interval is a window, ordered by start; the sets are compared, too."""
    answer = '<think></think><answer>{"intervals": [[50, 60], [0, 5]]}</answer>'
    found = evaluated(tmp_path, [{"id": "1", "response": answer}], "strict", multi_segment=True)
    assert found["missing"] == 2
    assert found["r1@0.5"] == pytest.approx(1 / 3) and found["r1@0.7"] == 0.0
    assert found["map@0.5"] == pytest.approx(1 / 3)
    assert found["map@0.75"] == pytest.approx(1 / 4 / 3)  # the second window has one of two
    assert found["set_iou"] == pytest.approx(15 / 20 / 3)
    assert found["set_f1"] == pytest.approx(2 * 15 / (15 + 20) / 3)
    assert found["count_accuracy"] == pytest.approx(1 / 3)
    unread = evaluated(tmp_path, [{"id": "1", "response": "0 to 5"}], "strict", multi_segment=True)
    assert unread["unparsable"] == 1 and unread["set_iou"] == unread["count_accuracy"] == 0.0


def test_multi_segment_needs_temporal_grounding(tmp_path: Path) -> None:
    row = {"video": "a.mp4", "question": "why", "candidates": ["x", "y"], "answer": "x"}
    (tmp_path / "mlvu.json").write_text(json.dumps([{**row, "duration": 9, "question_type": "q"}]))
    with pytest.raises(ConfigError, match="mlvu has no questions of temporal grounding"):
        questions("mlvu", str(tmp_path / "mlvu.json"), "", "strict", multi_segment=True)


@pytest.mark.parametrize(
    "windows", [[], [[0, 10]], [[0, 10, "high"]], None, [[0, float("nan"), 1]]]
)
def test_wrong_windows_are_named(tmp_path: Path, windows: Any) -> None:
    rows = [{"qid": 1, "pred_relevant_windows": windows}]
    with pytest.raises(DataError, match=r"line 1: field 'pred_relevant_windows' is .* expected at"):
        evaluated(tmp_path, rows, "strict")
