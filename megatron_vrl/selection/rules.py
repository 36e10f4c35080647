"""Rules of data selection: keep the samples whose answers differ in reward.

The idea is from Temporal-RLT (arXiv 2506.01908): keep questions that are sometimes answered right
and sometimes wrong, and grounding samples whose answers spread and are not all poor. The paper's
thresholds are not public; statistics and thresholds here are our own. A task names the components
that the rules look at (`Task.correctness`). Standard deviations divide by the number of answers n.
Samples are ranked by standard deviation in every task; for a fraction p of right answers it is
sqrt(p (1 - p)).

A budget keeps the highest ranks of each task, or draws samples at random (`draw.py`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_vrl.config import Selection
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.rewards.score import weighted_sum
from megatron_vrl.selection.draw import within_budget
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
    duration_s: float | None = None  # of the video; None: not recorded
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
            "duration_s": self.duration_s,
            "verdict": self.verdict,
            "rank": self.rank,
        }


def candidate(
    name: str,
    task: str,
    answers: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float],
    duration_s: float | None = None,
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
        duration_s=duration_s,
    )


def check_budget(rule: Selection) -> None:
    """Raise ConfigError if a key that divides the budget is set and there is none."""
    if not rule.budget and (rule.duration_buckets_s or rule.gaussian_filter_std > 0):
        raise ConfigError(
            "selection.gaussian_filter_std and selection.duration_buckets_s divide "
            "selection.budget, which is 0: set it to the number of samples to keep."
        )
    if rule.duration_buckets_s != sorted(set(rule.duration_buckets_s)):
        raise ConfigError(
            f"selection.duration_buckets_s={rule.duration_buckets_s} must increase: order it."
        )


def select(
    candidates: Sequence[Candidate], rule: Selection, seed: Sequence[int] = (0,)
) -> list[Candidate]:
    """Return the candidates in order, each with its verdict and rank.

    `seed` decides what selection.gaussian_filter_std draws. Raises ConfigError for a rule without
    the budget that it divides, DataError for candidates without the duration that it needs.

    Example with budget 3: of 4 grounding and 2 multiple-choice samples that pass the rules, the 2
    and the 1 with the highest rank are kept.
    """
    check_budget(rule)
    with_verdict = [replace(c, **_verdict(c, rule)) for c in candidates]
    passed = Counter(c.task for c in with_verdict if c.verdict == KEPT)
    quota = _quotas(passed, rule.budget) if rule.budget else passed
    over: set[str] = set()
    rng = np.random.default_rng(list(seed))
    for task, quota_of_task in sorted(quota.items()):
        passing = [c for c in with_verdict if c.task == task and c.verdict == KEPT]
        # a large budget does not fill the buckets of long videos with short ones
        most = max(quota_of_task, rule.budget * len(passing) // passed.total())
        over |= {c.id for c in passing} - _within_budget(passing, most, rule, rng)
    return [replace(c, verdict=OVER_BUDGET) if c.id in over else c for c in with_verdict]


def _within_budget(
    passing: Sequence[Candidate], most: int, rule: Selection, rng: np.random.Generator
) -> set[str]:
    """Return the ids of at most `most` of one task's candidates."""
    if not rule.budget:
        return {c.id for c in passing}
    durations_s = [c.duration_s for c in passing]
    if rule.duration_buckets_s and None in durations_s:
        raise DataError(
            f"The answers to sample {passing[durations_s.index(None)].id} have no duration, so an "
            "earlier version wrote them: answer the pool again into an empty directory."
        )
    kept = within_budget(
        np.array([c.rank for c in passing]),
        np.array([_content_mean(c) for c in passing]),
        np.array([duration_s or 0.0 for duration_s in durations_s]),
        most,
        rule,
        rng,
    )
    return {passing[index].id for index in kept}


def _content_mean(candidate: Candidate) -> float:
    """Return the mean of the components that score the content, such as the temporal IoU."""
    names = TASKS[candidate.task].correctness
    return float(np.mean([candidate.components[name].mean for name in names]))


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
