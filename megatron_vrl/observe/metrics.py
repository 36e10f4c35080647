"""Metrics of one step: StepMetrics, and the display title and unit of each metric.

Each task declares the titles of its own metrics (`Task.titles`). A metric without an entry in
`METRICS` is displayed under its own name.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megatron_vrl.tasks import TASKS

Phase = Literal["sft", "grpo", "eval"]


class MetricInfo(NamedTuple):
    """Display title and unit of a metric."""

    title: str
    unit: str  # "%": a fraction in [0, 1], displayed as a percentage


METRICS = {
    **{
        f"{task.name}/{metric}": MetricInfo(*title)
        for task in TASKS.values()
        for metric, title in task.titles.items()
    },
    "format_rate": MetricInfo("format", "%"),
    "reward/mean": MetricInfo("reward", ""),
    "reward/std": MetricInfo("standard deviation of the reward within a group", ""),
    "reward/format": MetricInfo("format", "%"),
    "response_length/mean": MetricInfo("response length", "tokens"),
    "response_length/clip_ratio": MetricInfo("truncated answers", "%"),
    "sft/loss": MetricInfo("loss", "nats per token"),
    "actor/loss": MetricInfo("loss", "nats per token"),
    "actor/kl": MetricInfo("KL to the reference", "nats per token"),
    "actor/entropy": MetricInfo("entropy", "nats per token"),
    "rollout/zero_variance_groups": MetricInfo("groups without a policy gradient", "%"),
    "rollout/zero_iou_groups": MetricInfo("groups in which no answer overlaps the truth", "%"),
    "rollout/logprob_gap": MetricInfo("log-prob gap, engine to trainer", "nats per token"),
    "actor/grad_norm": MetricInfo("gradient norm", ""),
    "actor/lr": MetricInfo("learning rate", ""),
    "perf/tokens_per_second": MetricInfo("trained tokens per second", "1/s"),
    "perf/tokens_computed": MetricInfo("tokens computed", "tokens"),
    "perf/tokens_needed": MetricInfo("tokens needed", "tokens"),
    "perf/prompt_reuse": MetricInfo("prompt reuse (tokens of the plain layout / computed)", ""),
    "perf/padding_fraction": MetricInfo("padding tokens", "%"),
    "perf/tflops_per_second": MetricInfo("model FLOPs of the update, per rank", "TFLOP/s"),
    "perf/hardware_tflops_per_second": MetricInfo(
        "computed FLOPs of the update, per rank", "TFLOP/s"
    ),
    "perf/mfu": MetricInfo("model FLOPs utilisation", "%"),
    "data/bad_samples": MetricInfo("samples replaced because of a bad video", ""),
    "data/bad_fraction": MetricInfo("samples with bad videos so far", "%"),
    "perf/peak_memory_gib": MetricInfo("peak memory of a rank", "GiB"),
}


def metric_info(name: str) -> MetricInfo:
    """Return title and unit of a metric."""
    return METRICS.get(name, MetricInfo(name, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Metrics of one step: one row of metrics.jsonl.

    `values` may be nested one level: {"reward": {"format": 0.5}} becomes "reward/format".
    `seconds` has the time of this step by phase of `Clock`. For an evaluation, `split` is the
    evaluated split, and (`during`, `step`) are the phase and the step of the evaluated weights.
    """

    phase: Phase
    step: int  # from 1; 0: before the first step
    values: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    split: str = ""
    during: str = ""

    def row(self) -> dict[str, Any]:
        """Return a flat row for JSON.

        Values that are not finite become null, so they are logged, not plotted.
        """
        row: dict[str, Any] = {"phase": self.phase, "step": self.step}
        if self.phase == "eval":
            row |= {"split": self.split, "during": self.during}
        row["timing_s"] = {name: round(value, 4) for name, value in self.seconds.items()}
        return row | flatten(self.values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Return nested values as {"a/b": float}, with None for a value that is not finite."""
    flat: dict[str, float | None] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = float(value) if math.isfinite(value) else None
    return flat
