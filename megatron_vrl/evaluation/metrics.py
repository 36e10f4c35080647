"""Metrics of an evaluation: one flat dict for each split.

An unreadable answer scores 0 in every mean, as a wrong one does, and is counted in `failure_rate`.
Each task computes its own metrics (`Task.metrics`) from answers read by its strict parser in either
reward mode. Only `reward` and `format_rate` follow the mode.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vrl.config import Rewards
from megatron_vrl.rewards.score import score
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.metrics import mean
from megatron_vrl.types import Parsed, Sample


@dataclass(frozen=True, slots=True)
class Scored:
    """One response with what was read from it and its reward."""

    sample: Sample
    parsed: Parsed
    components: dict[str, float]
    reward: float


def summarise(
    samples: Sequence[Sample], responses: Sequence[str], cfg: Rewards
) -> dict[str, float]:
    """Return the metrics of one response for each sample: `NAME` over all, and `TASK/NAME`.

    Raises ValueError if there is no sample, or not one response for each.
    """
    return metrics_of(score_responses(samples, responses, cfg))


def score_responses(
    samples: Sequence[Sample], responses: Sequence[str], cfg: Rewards
) -> list[Scored]:
    """Return what was read from one response for each sample, and its reward.

    Raises ValueError if there is no sample, or not one response for each.
    """
    if not samples or len(samples) != len(responses):
        raise ValueError(f"{len(samples)} samples and {len(responses)} responses.")
    weights = reward_weights(cfg)
    scored = []
    for sample, response in zip(samples, responses, strict=True):
        parsed = TASKS[sample.task].parse(response, sample)
        components, reward = score(sample, response, cfg.mode, weights[sample.task])
        scored.append(Scored(sample, parsed, components, reward))
    return scored


def metrics_of(scored: Sequence[Scored]) -> dict[str, float]:
    """Return the metrics of scored responses: `NAME` over all, and `TASK/NAME`."""
    summary = dict(_means(scored))
    for task in sorted({row.sample.task for row in scored}):
        of_task = [row for row in scored if row.sample.task == task]
        metrics = TASKS[task].metrics([row.sample for row in of_task], [r.parsed for r in of_task])
        summary |= {f"{task}/{name}": value for name, value in (*_means(of_task), *metrics.items())}
    return summary


def _means(scored: Sequence[Scored]) -> Iterator[tuple[str, float]]:
    """Yield the metrics that every task has; `format_rate` if one of them scores the format."""
    yield "num_samples", float(len(scored))
    yield "reward/mean", mean([row.reward for row in scored])
    formats = [row.components["format"] for row in scored if "format" in row.components]
    if formats:
        yield "format_rate", mean(formats)
    yield "failure_rate", mean([row.parsed.failure != "" for row in scored])
