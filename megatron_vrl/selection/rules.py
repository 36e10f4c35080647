"""Rules of data selection: keep the samples whose answers differ in reward.

The idea is from Temporal-RLT (arXiv 2506.01908): keep questions that are sometimes answered right
and sometimes wrong, and grounding samples whose answers spread and are not all poor. The paper's
thresholds are not public; statistics and thresholds here are our own. A task names the components
that the rules look at (`Task.correctness`). Standard deviations divide by the number of answers n.
Samples are ranked by standard deviation in every task; for a fraction p of right answers it is
sqrt(p (1 - p)).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_vrl.config import Selection
from megatron_vrl.errors import DataError
from megatron_vrl.rewards.score import weighted_sum
from megatron_vrl.tasks import TASKS

KEPT, OVER_BUDGET, UNDECODABLE = "kept", "over budget", "undecodable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and standard deviation over a sample's answers."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One sample of the pool with statistics of its answers."""

    id: str
    task: str
    components: Mapping[str, Spread]  # of each over the answers; {} for an unreadable video
    reward: Spread
    unreadable: float  # fraction of answers that could not be read
    verdict: str = ""  # KEPT, or why not
    rank: float = 0.0  # the higher, the more the answers spread

    def row(self) -> dict[str, Any]:
        """Return the candidate as a row of stats.jsonl."""
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
    """Return the statistics of the answers to one sample.

    Each of `answers` has {"components": {...}, "failure": text or None}. There are none if the
    video could not be read. `weights` are those of the task's components. Raises DataError for
    answers of an earlier version.
    """
    if answers and "components" not in answers[0]:
        raise DataError(
            f"The answers to sample {name} have no reward components, so an earlier version wrote "
            "them: answer the pool again into an empty directory."
        )
    names = list(answers[0]["components"]) if answers else []
    return Candidate(
        id=name,
        task=task,
        components={n: _spread([answer["components"][n] for answer in answers]) for n in names},
        reward=_spread([weighted_sum(answer["components"], weights) for answer in answers]),
        unreadable=sum(answer["failure"] is not None for answer in answers) / max(1, len(answers)),
    )


def select(candidates: Sequence[Candidate], rule: Selection) -> list[Candidate]:
    """Return the candidates in order, each with its verdict and rank.

    Example with budget 3: of 4 grounding and 2 multiple-choice samples that pass the rules, the 2
    and the 1 with the highest rank are kept.
    """
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


def _verdict(candidate: Candidate, rule: Selection) -> dict[str, Any]:
    """Return {"verdict", "rank"} of one sample, without regard to the budget."""
    if not candidate.components:
        return {"verdict": UNDECODABLE, "rank": 0.0}
    verdicts = []
    for name, kind in TASKS[candidate.task].correctness.items():
        spread = candidate.components[name]
        verdicts.append(_of_binary(spread) if kind == "binary" else _of_graded(spread, rule))
    kept = [rank for verdict, rank in verdicts if verdict == KEPT]
    if kept:  # one component with a learning signal is enough
        return {"verdict": KEPT, "rank": max(kept)}
    return {
        "verdict": ", ".join(verdict for verdict, _ in verdicts),
        "rank": max(rank for _, rank in verdicts),
    }


def _of_binary(spread: Spread) -> tuple[str, float]:
    """Return verdict and rank by a component that is 0 or 1."""
    if spread.mean == 0.0:
        return "all wrong", 0.0
    return ("all right", 0.0) if spread.mean == 1.0 else (KEPT, spread.std)


def _of_graded(spread: Spread, rule: Selection) -> tuple[str, float]:
    """Return verdict and rank by a component with values between 0 and 1."""
    poor = spread.mean < rule.min_mean
    if spread.std < rule.min_std:
        return ("little spread and poor" if poor else "little spread and good"), spread.std
    return ("spread but poor" if poor else KEPT), spread.std


def _quotas(passed: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return task -> samples to keep, in proportion to the samples that passed.

    Quotas are rounded down; the tasks with the largest remainders get one more each.
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
    """Return the spread of the values; 0 and 0 for none."""
    if not values:
        return Spread(mean=0.0, std=0.0)
    return Spread(mean=float(np.mean(values)), std=float(np.std(values)))
