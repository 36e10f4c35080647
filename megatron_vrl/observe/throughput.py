"""Throughput metrics of a step: tokens per second, FLOP/s and MFU.

Model FLOPs are the FLOPs that the algorithm needs, each counted once (convention of Megatron-LM and
of PaLM, arXiv 2204.02311). Hardware FLOPs are the FLOPs computed, including recomputation, padding
and repeated prompts. MFU uses model FLOPs, so wasted work cannot raise it.
`megatron_vrl/models/flops.py` counts both. Rollout is not included; the engine reports
its own throughput.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCounts:
    """Number of language tokens, and FLOPs of one forward pass by component."""

    tokens: int = 0
    linear: float = 0.0  # language layers: matrix products with weights
    attention: float = 0.0  # language layers: attention scores and values
    head: float = 0.0
    vision: float = 0.0  # vision tower without the merger
    merger: float = 0.0

    @property
    def flops(self) -> float:
        """Return the total FLOPs."""
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


def throughput_metrics(
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
    """Return the throughput metrics of one step; {} if nothing was computed.

    Token and FLOP counts are sums over all ranks. `update_flops` (model) and `hardware_flops` cover
    the phase "update" of `seconds`. `plain_tokens` is the token count of a layout that repeats the
    prompt for each answer. `peak` is the peak FLOP/s of one rank; without it MFU is omitted.

    Example: 2 ranks, update_flops 4e15, 10 s of update, peak 1e15: 4e15 / (10 * 2) = 2e14 FLOP/s
    per rank, MFU 0.2.
    """
    if not computed.tokens:
        return {}
    values = {
        "perf/tokens_computed": float(computed.tokens),
        "perf/tokens_needed": float(ideal.tokens),
        "perf/prompt_reuse": plain_tokens / computed.tokens,
        "perf/padding_fraction": padding_rows / computed.tokens,
        "perf/tokens_per_second": ideal.tokens / max(sum(seconds.values()), 1e-9),
    }
    rank_seconds = seconds.get("update", 0.0) * ranks
    if rank_seconds > 0:
        values["perf/tflops_per_second"] = update_flops / rank_seconds / 1e12
        values["perf/hardware_tflops_per_second"] = hardware_flops / rank_seconds / 1e12
        if peak is not None:
            values["perf/mfu"] = update_flops / rank_seconds / peak
    return values
