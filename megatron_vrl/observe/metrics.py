"""What one step measured, and how each number is called on a page.

A metric's name says the thing; its unit and its title stand here once. Names that are not listed
are shown as they are, so a new task may bring its own.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megatron_vrl.tasks import TASKS

Phase = Literal["sft", "grpo", "eval"]


class Meaning(NamedTuple):
    title: str
    unit: str  # "%" shows a share in [0, 1] as a percentage


MEANINGS = {
    **{
        f"{task.name}/{metric}": Meaning(*title)
        for task in TASKS.values()
        for metric, title in task.titles.items()
    },
    "format_rate": Meaning("format", "%"),
    "reward": Meaning("reward", ""),
    "response_tokens": Meaning("response length", "tokens"),
    "truncated_share": Meaning("truncated answers", "%"),
    "loss": Meaning("loss", "nats per token"),
    "ref_kl": Meaning("KL to the reference", "nats per token"),
    "entropy": Meaning("entropy", "nats per token"),
    "logprob_gap": Meaning("engine to trainer log-prob gap", "nats per token"),
    "grad_norm": Meaning("gradient norm", ""),
    "lr": Meaning("learning rate", ""),
    "tokens_per_second": Meaning("trained tokens per second", "1/s"),
    "tokens_computed": Meaning("tokens computed", "tokens"),
    "tokens_ideal": Meaning("tokens needed", "tokens"),
    "prompt_reuse": Meaning("tokens of a plain layout over computed", ""),
    "padding_share": Meaning("padding rows", "%"),
    "update_tflops_per_second": Meaning("model FLOPs of the update, per rank", "TFLOP/s"),
    "hardware_tflops_per_second": Meaning("computed FLOPs of the update, per rank", "TFLOP/s"),
    "mfu": Meaning("model FLOPs utilisation", "%"),
    "bad_samples": Meaning("samples replaced for their video", ""),
    "bad_sample_share": Meaning("samples with bad videos so far", "%"),
    "peak_memory_gib": Meaning("peak memory of a rank", "GiB"),
}


def meaning(name: str) -> Meaning:
    return MEANINGS.get(name, Meaning(name, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One row of metrics.jsonl.

    `values` may be nested one level: {"components": {"format": 0.5}} becomes "components/format".
    `seconds` are of this step, by phase of `Clock`. An evaluation names its split, and in `during`
    the phase whose weights it read, at which `step`.
    """

    phase: Phase
    step: int  # from 1; 0 is the state before the first step
    values: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    split: str = ""
    during: str = ""

    def row(self) -> dict[str, Any]:
        """Flat and ready for JSON. A number that is not finite becomes null: seen, not plotted."""
        row: dict[str, Any] = {"phase": self.phase, "step": self.step}
        if self.phase == "eval":
            row |= {"split": self.split, "during": self.during}
        row["seconds"] = {name: round(value, 4) for name, value in self.seconds.items()}
        return row | flatten(self.values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Nested numbers -> {"a/b": float or None when not finite}; numpy scalars are welcome."""
    flat: dict[str, float | None] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = float(value) if math.isfinite(value) else None
    return flat
