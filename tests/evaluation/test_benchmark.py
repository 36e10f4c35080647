"""Benchmarks from predictions: every number against its formula, and every failure counted."""

import json
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from megatron_vrl.errors import DataError
from megatron_vrl.evaluation import temporal_r1
from megatron_vrl.evaluation.benchmark import (
    items_of,
    questions,
    read_predictions,
    table,
    write_results,
)
from megatron_vrl.evaluation.protocols import BENCHMARKS, FAILURES, Protocol, interval_of_mean
from tests.data.formats import test_moment_and_long as more
from tests.data.formats.test_benchmarks import RECORDS, source_of
from tests.running import run_python

RNG = random.Random(3)
CAPTIONS: dict[str, dict[str, Any]] = {
    f"v{i}": {
        "duration": 30.0,
        "timestamps": [[start := RNG.uniform(0, 22), start + RNG.uniform(1, 10)] for _ in range(4)],
        "sentences": [f"event {j}" for j in range(4)],
    }
    for i in range(12)
}
GQA: list[dict[str, Any]] = [
    {
        "id": f"q{i}",
        "video": f"{i % 7}.mp4",
        "question": "why",
        "options": ["(A) a", "(B) b", "(C) c"],
        "duration": 40,
        "glue": [[5.0, 12.5], [20.0, 31.0]][: 1 + i % 2],
        "type": "CW" if i % 3 else "TN",
        "answer": f"({'ABC'[i % 3]})",
    }
    for i in range(60)
]


def grounding(start: float | str, end: float | str) -> str:
    return f'<think>x</think><answer>{{"start_time": "{start}", "end_time": "{end}"}}</answer>'


def evaluated(
    tmp_path: Path,
    name: str,
    annotations: Mapping[str, Any] | Sequence[dict[str, Any]],
    predictions: Iterable[dict[str, Any]],
    protocol: Protocol = "strict",
) -> dict[str, Any]:
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in predictions))
    samples = questions(name, str(tmp_path / "annotations.json"), "", protocol)
    items = items_of(name, samples, read_predictions(path, samples), protocol)
    return write_results(tmp_path / "out", name, protocol, items)


def overlap(p: tuple[float, float], t: list[float] | tuple[float, float]) -> float:
    return max(0.0, min(p[1], t[1]) - max(p[0], t[0]))


def iou(p: tuple[float, float], t: list[float] | tuple[float, float]) -> float:
    return overlap(p, t) / ((p[1] - p[0]) + (t[1] - t[0]) - overlap(p, t))


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("charades_sta", "strict"), ("activitynet", "strict"), ("charades_sta", "clipped")],
)
def test_grounding_numbers_by_their_formula(tmp_path: Path, name: str, protocol: Protocol) -> None:
    longest = 30.0 if protocol == "clipped" else 100.0
    predictions, ious = [], []
    for video, record in CAPTIONS.items():
        for index, truth in enumerate(record["timestamps"]):
            start = round(RNG.uniform(0, 25), 1)
            answer = (start, round(start + RNG.uniform(0.5, 12), 1))
            predictions.append({"id": f"{video}/{index}", "response": grounding(*answer)})
            cut = (answer[0], min(answer[1], longest))
            ious.append(iou(cut, (truth[0], min(truth[1], longest))))
    found = evaluated(tmp_path, name, CAPTIONS, reversed(predictions), protocol)
    assert found["num_questions"] == found["scored"] == found["answered"] == 48
    values = {metric: entry["value"] for metric, entry in found["metrics"].items()}
    assert values["miou"] == pytest.approx(statistics.mean(ious), abs=1e-12)
    for threshold in (0.3, 0.5, 0.7):
        share = sum(value >= threshold for value in ious) / 48
        assert values[f"r1@{threshold}"] == pytest.approx(share, abs=1e-12)
    for entry in found["metrics"].values():
        assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{v}/{i}" for v in CAPTIONS for i in range(4)]
    assert statistics.mean(row["values"]["miou"] for row in rows) == pytest.approx(values["miou"])
    assert f"{100 * values['miou']:.2f}" in table(found)


def test_grounded_qa_numbers_by_their_formula(tmp_path: Path) -> None:
    predictions, rows = [], []
    for record in GQA:
        start = round(RNG.uniform(0, 30), 1)
        answer, letter = (start, start + 6.0), RNG.choice("ABC")
        body = f'{{"option": "{letter}", "start_time": "{start}", "end_time": "{start + 6.0}"}}'
        response = f"<think></think><answer>{body}</answer>"
        predictions.append({"id": record["id"], "response": response})
        best_iou = max(iou(answer, truth) for truth in record["glue"])
        best_iop = max(overlap(answer, truth) / 6.0 for truth in record["glue"])
        rows.append((f"({letter})" == record["answer"], best_iou, best_iop))
    found = evaluated(tmp_path, "nextgqa", GQA, predictions)
    expected: dict[str, list[float]] = {
        "accuracy": [right for right, _, _ in rows],
        "miou": [i for _, i, _ in rows],
        "miop": [p for _, _, p in rows],
        "iou@0.5": [i >= 0.5 for _, i, _ in rows],
        "iop@0.5": [p >= 0.5 for _, _, p in rows],
        "accuracy_gqa": [right and p >= 0.5 for right, _, p in rows],
    }
    for name, values in expected.items():
        assert found["metrics"][name]["value"] == pytest.approx(sum(values) / 60, abs=1e-9), name
    of_type = [right for (right, _, _), r in zip(rows, GQA, strict=True) if r["type"] == "TN"]
    assert found["labels"]["type/TN"] == {
        "accuracy": pytest.approx(statistics.mean(of_type)),
        "num_questions": len(of_type),
    }


def test_failures_are_told_from_wrong_answers(tmp_path: Path) -> None:
    ids = [f"{video}/{index}" for video in CAPTIONS for index in range(4)]
    predictions: list[dict[str, Any]] = [
        {"id": name, "response": grounding(0, 30)} for name in ids[:40]
    ]
    predictions += [
        {"id": ids[40], "response": "I do not know"},
        {"id": ids[41], "response": "<think>and then", "finish": "length"},
        {"id": ids[42], "response": grounding(1, 2), "finish": "length"},  # cut after the answer
        {"id": ids[43], "response": None, "problem": "v10.mp4 is empty"},
        {"id": ids[44], "response": grounding(9, 3)},
    ]
    found = evaluated(tmp_path, "charades_sta", CAPTIONS, predictions)
    assert found["num_questions"] == 48 and found["answered"] == 41
    assert found["failures"] == {
        "unparsable": 2,
        "cut_off": 1,
        "undecodable": 1,
        "missing": 3,
        "unscorable": 0,
    }
    assert set(found["failures"]) == set(FAILURES)
    rows = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert rows[43]["reason"] == "v10.mp4 is empty" and rows[0]["failure"] is None
    assert found["metrics"]["miou"]["value"] == pytest.approx(
        sum(row["values"]["miou"] for row in rows) / 48
    )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_score_one(name: str, tmp_path: Path) -> None:
    """One contract for every row: the target of each question is what it asks for."""
    form = BENCHMARKS[name].form
    if form in RECORDS:
        annotations = source_of(form, tmp_path).json_path
    elif form in more.RECORDS:
        answerable = {  # with one interval or option that is right
            "mlvu": {"4_count": more.MLVU["4_count"]},
            "qvhighlights": [more.QVH[0] | {"relevant_windows": [[0, 4]]}],
        }
        annotations = more.source_of(form, tmp_path, answerable.get(form)).json_path
    else:
        annotations = str(tmp_path / "a.json")
        records = GQA if form == "next_gqa" else CAPTIONS
        (tmp_path / "a.json").write_text(json.dumps(records))
    from megatron_vrl.tasks import TASKS, can_be_asked

    for protocol in get_args(Protocol):
        samples = questions(name, annotations, "", protocol)
        path = tmp_path / "predictions.jsonl"
        path.write_text(
            "".join(
                json.dumps({"id": s.id, "response": TASKS[s.task].target(s)}) + "\n"
                for s in samples
                if can_be_asked(s)
            )
        )
        items = items_of(name, samples, read_predictions(path, samples), protocol)
        found = write_results(tmp_path / "out", name, protocol, items)
        assert found["num_questions"] == len(samples)
        assert found["failures"]["unscorable"] == (1 if name == "mmvu" else 0)
        for metric, entry in found["metrics"].items():  # targets are written to 0.1 s
            assert entry["value"] > 0.97, (protocol, metric)


def test_several_questions_of_one_video_count_once_by_video(tmp_path: Path) -> None:
    rtl = [
        {"question_id": i, "vid": vid, "question": "when", "answer": "<0> <10>", "duration": 20.0}
        for i, vid in enumerate("aaab")
    ]
    answers = [grounding(0, 10), grounding(0, 5), grounding(10, 20), grounding(0, 20)]
    predictions = [{"id": str(i), "response": a} for i, a in enumerate(answers)]
    found = evaluated(tmp_path, "activitynet_rtl", rtl, predictions)
    assert found["metrics"]["miou"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert found["metrics"]["miou_by_video"]["value"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["metrics"]["p@0.5_by_video"]["value"] == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize(
    ("response", "seconds"),
    [
        (grounding("15.0", "6.0"), (6.0, 15.0)),  # swapped
        ("words " + grounding("6", "40") + " words", (6.0, 40.0)),  # anywhere, not clipped
        (grounding("1.2.3", "9"), (0.0, 0.0)),
        ("6.0 - 15.0", (0.0, 0.0)),
        ("", (0.0, 0.0)),
    ],
)
def test_the_seeds_reading_of_times(response: str, seconds: tuple[float, float]) -> None:
    assert temporal_r1.read_interval(response)[0] == seconds


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ('<answer>{"option": "B"}</answer>', "B"),
        ('<answer>{"option": "(C)"}</answer>', "C"),
        ('<answer>"A"</answer><answer>"B"</answer>', "A"),
        ("D. because", "D"),
        ("It is (b)", "B"),
        ("a dog", "A"),  # the released reader's own mistake
        ("none", ""),
        ("", ""),
    ],
)
def test_the_seeds_reading_of_options(response: str, letter: str) -> None:
    assert temporal_r1.read_option(response)[0] == letter


@pytest.mark.parametrize(
    ("protocol", "answer", "miou", "unparsable"),
    [
        ("strict", ("20.0", "34.0"), 1.0, 0),
        ("strict", ("20.0", "60.0"), 14 / 40, 0),  # beyond truth and video
        ("strict", ("34.0", "20.0"), 0.0, 1),  # reversed
        ("clipped", ("20.0", "60.0"), 1.0, 0),
        ("clipped", ("31.0", "34.0"), 0.0, 1),  # no part of the video
        ("temporal_r1", ("34.0", "20.0"), 1.0, 0),
    ],
)
def test_a_truth_and_an_answer_beyond_the_video(
    tmp_path: Path, protocol: Protocol, answer: tuple[str, str], miou: float, unparsable: int
) -> None:
    records = {"v": {"duration": 30.0, "timestamps": [[20.0, 34.0]], "sentences": ["x"]}}
    predictions = [{"id": "v/0", "response": grounding(*answer)}]
    found = evaluated(tmp_path, "charades_sta", records, predictions, protocol)
    assert found["metrics"]["miou"]["value"] == pytest.approx(miou)
    assert found["failures"]["unparsable"] == unparsable


@pytest.mark.parametrize(("protocol", "scored"), [("strict", 4), ("clipped", 1)])
def test_every_published_question_counts(tmp_path: Path, protocol: Protocol, scored: int) -> None:
    """A truth after the video, one of no length and a question without text stay in the mean."""
    spans = [[0.0, 10.0], [31.0, 34.0], [5.0, 5.0], [-4.0, -1.0]]
    texts = ["", "b", "c", "d"]
    records = {"v": {"duration": 30.0, "timestamps": spans, "sentences": texts}}
    predictions = [{"id": f"v/{index}", "response": grounding(0, 30)} for index in range(4)]
    found = evaluated(tmp_path, "charades_sta", records, predictions, protocol)
    assert (found["num_questions"], found["scored"]) == (4, scored)
    assert found["failures"]["unscorable"] == 4 - scored
    assert found["metrics"]["miou"]["value"] == pytest.approx((1 / 3) / scored)


@pytest.mark.parametrize(("name", "reached"), [("charades_sta", 1.0), ("tvgbench", 0.0)])
def test_an_iou_equal_to_the_threshold(tmp_path: Path, name: str, reached: float) -> None:
    """Time-R1's script counts IoU > 0.5, the others IoU >= 0.5."""
    records: Any = {"v": {"duration": 30.0, "timestamps": [[0.0, 10.0]], "sentences": ["x"]}}
    if name == "tvgbench":
        records = [{"path": "v", "question": "x", "answer": "0.0-10.0", "duration": 30.0}]
    predictions = [{"id": "v/0", "response": grounding(0, 20)}]
    found = evaluated(tmp_path, name, records, predictions)
    assert found["metrics"]["miou"]["value"] == 0.5
    assert found["metrics"]["r1@0.5"]["value"] == reached


def test_the_bootstrap_covers_a_known_spread() -> None:
    values = [float(i % 10 < 3) for i in range(1000)]  # mean 0.3
    low, high = interval_of_mean(np.array(values), seed=0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.004)
    assert high == pytest.approx(0.3 + half, abs=0.004)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"id": "v0/9", "response": ""}], "no question has the id 'v0/9'; an id is like 'v0/0'."),
        ([{"id": "v0/0", "response": ""}] * 2, "line 2: 'v0/0' is there twice."),
        ([{"response": ""}], "line 1: no field 'id'"),
        ([{"id": "v0/0"}], "line 1: field 'response' is None, not a text."),
    ],
)
def test_a_wrong_prediction_is_named(
    tmp_path: Path, rows: list[dict[str, str]], sentence: str
) -> None:
    with pytest.raises(DataError) as error:
        evaluated(tmp_path, "charades_sta", CAPTIONS, rows)
    assert sentence in str(error.value)


def test_the_tool_prints_json_and_one_sentence_for_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CAPTIONS))
    (tmp_path / "p.jsonl").write_text('{"id": "v0/0", "response": "x"}\n')
    arguments: list[object] = ["tools/evaluate.py", "--benchmark=charades_sta", "--annotations"]
    arguments += [tmp_path / "a.json", "--out", tmp_path / "out"]
    done = run_python(*arguments, "--predictions", tmp_path / "p.jsonl", "--json")
    assert (done.returncode, done.stderr) == (0, f"Written: {tmp_path / 'out'}\n")
    found = json.loads(done.stdout)
    assert found["failures"]["missing"] == 47 and found["metrics"]["miou"]["value"] == 0.0
    done = run_python(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: Give either --checkpoint")
