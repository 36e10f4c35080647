"""Rules of variance-aware data selection, from the rewards of several answers to each sample.

The idea is Temporal-RLT's (arXiv 2506.01908): keep questions that are answered correctly sometimes,
and grounding samples whose IoU varies and is not always low. The paper gives no thresholds, so the
statistics and thresholds here are ours. Standard deviations are over the answers (divided by n).
Samples of every task are ranked by it. For a fraction p of correct answers it is sqrt(p (1 - p)).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_vrl.config import Selection
from megatron_vrl.rewards import weighted

KEPT, OVER_BUDGET, UNDECODABLE = "kept", "over budget", "undecodable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One sample of the pool with the statistics of its answers."""

    id: str
    task: str
    parts: Mapping[str, Spread]  # reward component -> statistics; {} for an unreadable video
    reward: Spread
    unreadable: float  # fraction of answers without a readable format
    verdict: str = ""  # KEPT, or the reason for dropping
    rank: float = 0.0  # higher if the answers vary more

    def row(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "id": self.id,
            "task": self.task,
            "reward": {"mean": self.reward.mean, "std": self.reward.std},
            "parts": {n: {"mean": s.mean, "std": s.std} for n, s in self.parts.items()},
            "unreadable": self.unreadable,
            "verdict": self.verdict,
            "rank": self.rank,
        }


def candidate(
    name: str, task: str, answers: Sequence[Mapping[str, Any]], weights: Mapping[str, float]
) -> Candidate:
    """Return the statistics of a sample's answers, without a verdict.

    `answers`: {"parts": {...}, "failure": text or None} each; empty for an unreadable video.
    """
    names = list(answers[0]["parts"]) if answers else []
    return Candidate(
        id=name,
        task=task,
        parts={part: _spread([answer["parts"][part] for answer in answers]) for part in names},
        reward=_spread([weighted(answer["parts"], weights) for answer in answers]),
        unreadable=sum(answer["failure"] is not None for answer in answers) / max(1, len(answers)),
    )


def select(candidates: Sequence[Candidate], rule: Selection) -> list[Candidate]:
    """Return the candidates in their order, each with its verdict and rank."""
    with_verdict = [replace(c, **_verdict(c, rule)) for c in candidates]
    passed = Counter(c.task for c in with_verdict if c.verdict == KEPT)
    quota = _quotas(passed, rule.budget) if rule.budget else passed
    over: set[str] = set()
    for task, most in quota.items():
        ranked = sorted(
            (c for c in with_verdict if c.task == task and c.verdict == KEPT), key=lambda c: -c.rank
        )
        over |= {c.id for c in ranked[most:]}
    return [replace(c, verdict=OVER_BUDGET) if c.id in over else c for c in with_verdict]


def _verdict(found: Candidate, rule: Selection) -> dict[str, Any]:
    if not found.parts:
        return {"verdict": UNDECODABLE, "rank": 0.0}
    verdicts = []
    if "accuracy" in found.parts:
        verdicts.append(_of_options(found.parts["accuracy"]))
    if "temporal_iou" in found.parts:
        verdicts.append(_of_intervals(found.parts["temporal_iou"], rule))
    kept = [rank for verdict, rank in verdicts if verdict == KEPT]
    if kept:  # a grounded question needs only one of the two
        return {"verdict": KEPT, "rank": max(kept)}
    return {
        "verdict": ", ".join(verdict for verdict, _ in verdicts),
        "rank": max(rank for _, rank in verdicts),
    }


def _of_options(accuracy: Spread) -> tuple[str, float]:
    if accuracy.mean == 0.0:
        return "all wrong", 0.0
    return ("all right", 0.0) if accuracy.mean == 1.0 else (KEPT, accuracy.std)


def _of_intervals(iou: Spread, rule: Selection) -> tuple[str, float]:
    poor = iou.mean < rule.min_mean
    if iou.std < rule.min_std:
        return ("little spread and poor" if poor else "little spread and good"), iou.std
    return ("spread but poor" if poor else KEPT), iou.std


def _quotas(passed: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return the budget of each task in proportion to its passed samples.

    Remaining samples after rounding down go to the largest remainders.
    """
    total = sum(passed.values())
    if total <= budget:
        return dict(passed)
    exact = {task: budget * count / total for task, count in passed.items()}
    quotas = {task: int(quota) for task, quota in exact.items()}
    by_remainder = sorted(exact, key=lambda task: quotas[task] - exact[task])
    for task in by_remainder[: budget - sum(quotas.values())]:
        quotas[task] += 1
    return quotas


def _spread(values: Sequence[float]) -> Spread:
    if not values:
        return Spread(mean=0.0, std=0.0)
    return Spread(mean=float(np.mean(values)), std=float(np.std(values)))
