"""A step's work and seconds -> the numbers that say how well the hardware was used.

Model FLOPs are what the mathematics asks for, once (Megatron-LM's and PaLM's convention, arXiv
2204.02311); hardware FLOPs are what was computed, with recompute, padding and repeated prompts.
MFU is of model FLOPs, so nothing wasteful can raise it. Where the counts come from:
`megatron_vrl/models/qwen2_5_vl/flops.py`. Left out: rollout, whose engine has meters of its own.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounts:
    """Tokens of the language model, and FLOPs of one forward pass by where they are spent."""

    tokens: int = 0
    linear: float = 0.0  # language layers: products with weights
    attention: float = 0.0  # language layers: scores and values
    head: float = 0.0
    vision: float = 0.0  # tower without its merger
    merger: float = 0.0

    @property
    def flops(self) -> float:
        return self.linear + self.attention + self.head + self.vision + self.merger

    def __add__(self, other: "FlopCounts") -> "FlopCounts":
        tokens, *parts = (a + b for a, b in zip(astuple(self), astuple(other), strict=True))
        linear, attention, head, vision, merger = parts
        return FlopCounts(
            tokens=int(tokens),
            linear=linear,
            attention=attention,
            head=head,
            vision=vision,
            merger=merger,
        )


def step_meters(
    *,
    computed: FlopCounts,
    ideal: FlopCounts,
    plain_tokens: int,
    padding_rows: int,
    update_flops: float,
    hardware_flops: float,
    seconds: Mapping[str, float],
    ranks: int,
    peak: float | None,
) -> dict[str, float]:
    """Metric names and values of one step; {} if nothing was computed.

    Counts are over all ranks, and both FLOPs of all that the phase "update" of `seconds` did.
    `plain_tokens`: of a layout that repeats the prompt for each answer. `peak`: FLOP/s of one
    rank; None, if not known, leaves MFU out.
    """
    if not computed.tokens:
        return {}
    values = {
        "tokens_computed": float(computed.tokens),
        "tokens_ideal": float(ideal.tokens),
        "prompt_reuse": plain_tokens / computed.tokens,
        "padding_share": padding_rows / computed.tokens,
        "tokens_per_second": ideal.tokens / max(sum(seconds.values()), 1e-9),
    }
    rank_seconds = seconds.get("update", 0.0) * ranks
    if rank_seconds > 0:
        values["update_tflops_per_second"] = update_flops / rank_seconds / 1e12
        values["hardware_tflops_per_second"] = hardware_flops / rank_seconds / 1e12
        if peak is not None:
            values["mfu"] = update_flops / rank_seconds / peak
    return values
