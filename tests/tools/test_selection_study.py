"""The pure parts of the selection study: wrong annotations and the choice of a subset."""

import pytest
from selection_study import Measured, choose, corrupted, table

from megatron_vrl.config import Selection
from megatron_vrl.selection.rules import KEPT, candidate, select

CLIPS = {f"clip_{i}": {"duration": 16.0, "timestamps": [[2.0, 6.0]]} for i in range(40)}
IOUS = [[(7 * i % 11) / 10 * (i % 2), (3 * i % 7) / 6] for i in range(60)]
POOL = [
    Measured(id=str(i), mean=(a + b) / 2, std=abs(a - b) / 2, is_wrong=False, passes=True)
    for i, (a, b) in enumerate(IOUS)
]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_wrong_annotations_is_exact_and_they_are_wrong(share: float) -> None:
    changed, wrong = corrupted(CLIPS, share, seed=1)
    assert len(wrong) == share * len(CLIPS)
    assert {name for name in CLIPS if changed[name] != CLIPS[name]} == set(wrong)
    for name in wrong:
        ((start, end),) = changed[name]["timestamps"]
        assert start >= 0 and 2 <= end - start <= 6 and end <= 16


def test_the_seed_alone_decides_which() -> None:
    assert corrupted(CLIPS, 0.5, seed=1) == corrupted(CLIPS, 0.5, seed=1)
    assert corrupted(CLIPS, 0.5, seed=1)[1] != corrupted(CLIPS, 0.5, seed=2)[1]


@pytest.mark.parametrize("arm", ["both", "spread"])
def test_an_arm_is_the_tools_rule_with_a_budget(arm: str) -> None:
    floor = sorted(sample.mean for sample in POOL)
    median = (floor[29] + floor[30]) / 2 if arm == "both" else 0.0
    answers = [
        [{"components": {"temporal_iou": x}, "failure": None} for x in pair] for pair in IOUS
    ]
    rule = Selection(min_std=0.0, min_mean=median, budget=12)
    found = [candidate(str(i), "temporal_grounding", a, {}) for i, a in enumerate(answers)]
    kept = {c.id for c in select(found, rule) if c.verdict == KEPT}
    assert {sample.id for sample in choose(POOL, arm, 12, seed=1)} == kept


def test_random_arms_are_as_large_and_the_floor_holds() -> None:
    drawn = {arm: choose(POOL, arm, 12, seed=1) for arm in ("both", "random", "spread", "floor")}
    assert {len({sample.id for sample in chosen}) for chosen in drawn.values()} == {12}
    lowest = {arm: min(sample.mean for sample in chosen) for arm, chosen in drawn.items()}
    assert lowest["floor"] >= sorted(sample.mean for sample in POOL)[29] > lowest["random"]
    assert drawn["random"] == choose(POOL, "random", 12, seed=1) != choose(POOL, "random", 12, 2)


def test_the_table_has_mean_and_range() -> None:
    rows = [
        {"share": 0.5, "arm": "both", "wrong": w, "miou": {"0": 0.4, "50": m}}
        for w, m in [(0.25, 0.5), (0.35, 0.6)]
    ]
    assert table(rows) == [
        "| wrong in pool | trained on | seeds | wrong in subset | mIoU @0 | mIoU @50 |",
        "|-|-|-|-|-|-|",
        "| 50% | both | 2 | 30% (25% to 35%) | 0.400 (0.400 to 0.400) | 0.550 (0.500 to 0.600) |",
    ]
