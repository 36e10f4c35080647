"""Selection: the rules on made-up answers, by hand and by hypothesis, and the files they write."""

import json
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Selection
from megatron_vrl.errors import DataError
from megatron_vrl.selection.rules import KEPT, OVER_BUDGET, UNDECODABLE, candidate, select

RULE = Selection(min_std=0.1, min_mean=0.2)


def answers(**components: list[float]) -> list[dict[str, Any]]:
    """{"accuracy": [1, 0]} -> two answers."""
    length = len(next(iter(components.values())))
    return [
        {
            "components": {name: float(values[i]) for name, values in components.items()},
            "failure": None,
        }
        for i in range(length)
    ]


TASK_OF = {
    ("accuracy",): "multiple_choice",
    ("temporal_iou",): "temporal_grounding",
    ("accuracy", "temporal_iou"): "grounded_qa",
}


def verdict(rows: list[dict[str, Any]], rule: Selection = RULE) -> str:
    task = TASK_OF[tuple(rows[0]["components"])] if rows else "temporal_grounding"
    (selected,) = select([candidate("a", task, rows, {"temporal_iou": 1.0})], rule)
    return selected.verdict


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (answers(accuracy=[0, 0, 0]), "all wrong"),
        (answers(accuracy=[1, 1, 1]), "all right"),
        (answers(accuracy=[0, 1, 1]), KEPT),
        (answers(temporal_iou=[0.0, 0.01, 0.0]), "little spread and poor"),
        (answers(temporal_iou=[0.8, 0.82, 0.8]), "little spread and good"),
        (answers(temporal_iou=[0.0, 0.4, 0.0]), "spread but poor"),
        (answers(temporal_iou=[0.2, 0.9, 0.5]), KEPT),
        (answers(accuracy=[1, 1, 1], temporal_iou=[0.2, 0.9, 0.5]), KEPT),
        (answers(accuracy=[0, 1, 0], temporal_iou=[0.0, 0.0, 0.0]), KEPT),
        (
            answers(accuracy=[0, 0, 0], temporal_iou=[0.9, 0.9, 0.9]),
            "all wrong, little spread and good",
        ),
        ([], UNDECODABLE),
    ],
)
def test_the_rules(rows: list[dict[str, Any]], expected: str) -> None:
    assert verdict(rows) == expected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 0.5), st.floats(0, 1))
def test_the_grounding_rule_by_its_definition(
    ious: list[float], min_std: float, min_mean: float
) -> None:
    rule = Selection(min_std=min_std, min_mean=min_mean)
    (found,) = select([candidate("a", "temporal_grounding", answers(temporal_iou=ious), {})], rule)
    assert found.components["temporal_iou"].std == pytest.approx(statistics.pstdev(ious), abs=1e-12)
    if abs(found.rank - min_std) > 1e-9 and abs(statistics.fmean(ious) - min_mean) > 1e-9:
        keeps = statistics.pstdev(ious) >= min_std and statistics.fmean(ious) >= min_mean
        assert (found.verdict == KEPT) == keeps


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), max_size=30),
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), max_size=30),
    st.integers(1, 20),
)
def test_a_budget_keeps_the_largest_deviations_of_each_task(
    ious: list[list[float]], rights: list[list[float]], budget: int
) -> None:
    rows = [("g", "temporal_grounding", answers(temporal_iou=values)) for values in ious]
    rows += [("c", "multiple_choice", answers(accuracy=values)) for values in rights]
    pool = [candidate(f"{kind}{i}", task, r, {}) for i, (kind, task, r) in enumerate(rows)]
    free = [found for found in select(pool, RULE) if found.verdict == KEPT]
    chosen = select(pool, Selection(min_std=0.1, min_mean=0.2, budget=budget))
    kept = [found for found in chosen if found.verdict == KEPT]
    assert len(kept) == min(budget, len(free))
    for task in ("temporal_grounding", "multiple_choice"):
        inside = [f.rank for f in kept if f.task == task]
        beyond = [f.rank for f in chosen if f.task == task and f.verdict == OVER_BUDGET]
        assert min(inside, default=1.0) >= max(beyond, default=0.0)
        share = budget * sum(f.task == task for f in free) / max(1, len(free))
        assert abs(len(inside) - min(share, sum(f.task == task for f in free))) < 1


def test_answers_of_an_earlier_version_are_refused() -> None:
    with pytest.raises(DataError, match="answers to sample a have no reward components"):
        candidate("a", "grounded_qa", [{"parts": {"format": 1.0}, "failure": None}], {})


def test_a_row_can_be_written_as_json() -> None:
    rows = answers(accuracy=[0, 1], format=[1, 1])
    rows[0]["failure"] = "no <answer>"
    weights = {"format": 0.5, "accuracy": 0.5}
    (found,) = select([candidate("a", "multiple_choice", rows, weights)], RULE)
    assert json.loads(json.dumps(found.row())) == {
        "id": "a",
        "task": "multiple_choice",
        "reward": {"mean": 0.75, "std": 0.25},
        "components": {"accuracy": {"mean": 0.5, "std": 0.5}, "format": {"mean": 1.0, "std": 0.0}},
        "unreadable": 0.5,
        "duration_s": None,
        "verdict": KEPT,
        "rank": 0.5,
    }
