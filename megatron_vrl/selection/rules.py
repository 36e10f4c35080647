"""Variance-aware selection: which samples have something to teach, from several answers to each.

After the idea of Temporal-RLT (arXiv 2506.01908): keep questions answered right sometimes and wrong
sometimes, and grounding samples whose answers spread and are not all poor. The paper's numbers are
not public; statistics and thresholds here are ours. Standard deviations are over the answers
themselves (divided by n). Samples are ranked by it in every task: for a share p of right answers it
is sqrt(p (1 - p)).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_vrl.config import Selection
from megatron_vrl.rewards.score import weighted_sum
from megatron_vrl.tasks import TASKS

KEPT, OVER_BUDGET, UNDECODABLE = "kept", "over budget", "undecodable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One sample of the pool with what its answers say of it."""

    id: str
    task: str
    components: Mapping[str, Spread]  # of each over the answers; {} for an unreadable video
    reward: Spread
    unreadable: float  # share of answers without a readable form
    verdict: str = ""  # KEPT, or why not
    rank: float = 0.0  # the higher, the more the answers spread

    def row(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "id": self.id,
            "task": self.task,
            "reward": {"mean": self.reward.mean, "std": self.reward.std},
            "components": {n: {"mean": s.mean, "std": s.std} for n, s in self.components.items()},
            "unreadable": self.unreadable,
            "verdict": self.verdict,
            "rank": self.rank,
        }


def candidate(
    name: str, task: str, answers: Sequence[Mapping[str, Any]], weights: Mapping[str, float]
) -> Candidate:
    """`answers`: {"components": {...}, "failure": text or None} each; none if unreadable video."""
    names = list(answers[0]["components"]) if answers else []
    return Candidate(
        id=name,
        task=task,
        components={n: _spread([answer["components"][n] for answer in answers]) for n in names},
        reward=_spread([weighted_sum(answer["components"], weights) for answer in answers]),
        unreadable=sum(answer["failure"] is not None for answer in answers) / max(1, len(answers)),
    )


def select(candidates: Sequence[Candidate], rule: Selection) -> list[Candidate]:
    """The same, in order, each with its verdict and rank."""
    judged = [replace(c, **_verdict(c, rule)) for c in candidates]
    passed = Counter(c.task for c in judged if c.verdict == KEPT)
    quota = _quotas(passed, rule.budget) if rule.budget else passed
    over: set[str] = set()
    for task, most in quota.items():
        ranked = sorted(
            (c for c in judged if c.task == task and c.verdict == KEPT), key=lambda c: -c.rank
        )
        over |= {c.id for c in ranked[most:]}
    return [replace(c, verdict=OVER_BUDGET) if c.id in over else c for c in judged]


def _verdict(found: Candidate, rule: Selection) -> dict[str, Any]:
    if not found.components:
        return {"verdict": UNDECODABLE, "rank": 0.0}
    verdicts = []
    for name, kind in TASKS[found.task].correctness.items():
        spread = found.components[name]
        verdicts.append(_of_binary(spread) if kind == "binary" else _of_graded(spread, rule))
    kept = [rank for verdict, rank in verdicts if verdict == KEPT]
    if kept:  # one component with a learning signal is enough
        return {"verdict": KEPT, "rank": max(kept)}
    return {
        "verdict": ", ".join(verdict for verdict, _ in verdicts),
        "rank": max(rank for _, rank in verdicts),
    }


def _of_binary(found: Spread) -> tuple[str, float]:
    """Return verdict and rank by a component that is 0 or 1."""
    if found.mean == 0.0:
        return "all wrong", 0.0
    return ("all right", 0.0) if found.mean == 1.0 else (KEPT, found.std)


def _of_graded(found: Spread, rule: Selection) -> tuple[str, float]:
    """Return verdict and rank by a component with values between 0 and 1."""
    poor = found.mean < rule.min_mean
    if found.std < rule.min_std:
        return ("little spread and poor" if poor else "little spread and good"), found.std
    return ("spread but poor" if poor else KEPT), found.std


def _quotas(passed: Mapping[str, int], budget: int) -> dict[str, int]:
    """The budget by the tasks' shares; what rounding leaves goes to the largest remainders."""
    total = sum(passed.values())
    if total <= budget:
        return dict(passed)
    exact = {task: budget * count / total for task, count in passed.items()}
    quotas = {task: int(share) for task, share in exact.items()}
    by_remainder = sorted(exact, key=lambda task: quotas[task] - exact[task])
    for task in by_remainder[: budget - sum(quotas.values())]:
        quotas[task] += 1
    return quotas


def _spread(values: Sequence[float]) -> Spread:
    if not values:
        return Spread(mean=0.0, std=0.0)
    return Spread(mean=float(np.mean(values)), std=float(np.std(values)))
