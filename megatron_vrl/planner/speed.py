"""Seconds of the phases of a step, by cause.

The seconds of a phase are the sum of parts that do not overlap: matrix products at a fraction of
the peak (`mfu`), messages at a fraction of the link speed, memory reads at a fraction of the HBM
speed. The default `mfu` is the lower end of Megatron's published figures for whole steps (41 to 48
% of an H100's bfloat16 peak, 37 % of its FP8 peak), because messages and pipeline idle time are
counted separately here, and these layers are not fused. None of these rates was measured by this
project on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, log2

from megatron_vrl.config import RunConfig
from megatron_vrl.models.activations import FLOAT32, dtype_bytes
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.flops import flops_of_sizes, hardware_flops
from megatron_vrl.models.pipeline_split import stage_chunks
from megatron_vrl.models.recompute import fraction_in_full
from megatron_vrl.observe.throughput import FlopCounts
from megatron_vrl.planner.hardware import Gpu
from megatron_vrl.planner.parameters import ParameterCounts
from megatron_vrl.planner.workload import PackedBatch

DEFAULT_MFU = 0.40


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Seconds of a phase by cause."""

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Return the sum of all parts."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """Return the cause with the most seconds."""
        return max(self.parts, key=lambda name: self.parts[name]) if self.seconds else "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """GPUs with the reached fraction of their peak."""

    gpu: Gpu
    gpus: int
    mfu: float

    def compute(self, flops: float, dtype: str) -> float:
        """Return the seconds of `flops` in `dtype`."""
        peak = self.gpu.peak(dtype)
        assert peak is not None, f"{self.gpu.name} has no {dtype}"  # see plan.refusals
        return flops / (peak * self.mfu)

    def link(
        self, num_bytes: float, span: int, calls: float = 0, ranks: int = 1
    ) -> tuple[str, float]:
        """Return name and seconds of the link between ranks within `span` consecutive GPUs.

        `num_bytes` is the total of `calls` messages among `ranks` ranks. Each call adds the latency
        of a tree over the ranks.
        """
        inside = span <= self.gpu.per_node
        speed = self.gpu.nvlink if inside else self.gpu.network
        waits = calls * ceil(log2(ranks)) * self.gpu.latency
        seconds = num_bytes / (speed * self.gpu.link_fraction) + waits
        return "NVLink" if inside else "network", seconds

    def hbm(self, num_bytes: float) -> float:
        """Return the seconds to read or write `num_bytes` of GPU memory."""
        return num_bytes / (self.gpu.hbm * self.gpu.hbm_fraction)


def batch_flops(arch: Architecture, batch: PackedBatch) -> FlopCounts:
    """Return the FLOPs of one forward pass of a micro-batch, over all ranks of the replica."""
    size = batch.group
    one = flops_of_sizes(
        arch, size.prompt, [size.response] * size.answers, [size.grid] if size.grid else []
    )
    return scaled(one, batch.groups)


def scaled(work: FlopCounts, by: float) -> FlopCounts:
    """Return `work` multiplied by `by`."""
    return FlopCounts(
        tokens=round(work.tokens * by),
        linear=work.linear * by,
        attention=work.attention * by,
        head=work.head * by,
        vision=work.vision * by,
        merger=work.merger * by,
    )


def stage_flops(cfg: RunConfig, arch: Architecture, work: FlopCounts, stage: int) -> FlopCounts:
    """Return the part of `work` that one rank of a pipeline stage computes."""
    parallel = cfg.parallel
    chunks = stage_chunks(arch, cfg.model, parallel, stage)
    layers = sum(len(chunk.layers) for chunk in chunks) / arch.layers
    embeds, ends = any(c.pre_process for c in chunks), any(c.post_process for c in chunks)
    own = FlopCounts(
        tokens=work.tokens,
        linear=work.linear * layers,
        attention=work.attention * layers,
        head=work.head * ends,
        vision=work.vision * embeds,
        merger=work.merger * embeds,
    )
    return scaled(own, 1 / (parallel.tensor * parallel.context))


def training_pass(
    cfg: RunConfig,
    arch: Architecture,
    batch: PackedBatch,
    micro_batches: int,
    machine: Machine,
    *,
    backward: bool,
    encodes: bool = True,
) -> Phase:
    """Return the seconds of all micro-batches through the pipeline.

    Without `encodes` the outputs of the vision tower are kept from an earlier pass.
    They are the seconds of the slowest stage, plus its idle time while the pipeline fills and
    drains: (p - 1) / v of one micro-batch (arXiv 2104.04473).
    """
    parallel = cfg.parallel
    work = batch_flops(arch, batch)
    work = work if encodes else replace(work, vision=0.0)
    stages = [
        _of_stage(cfg, arch, batch, stage_flops(cfg, arch, work, stage), stage, machine, backward)
        for stage in range(parallel.pipeline)
    ]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    parts = {name: seconds * micro_batches for name, seconds in slowest.items()}
    idle = sum(slowest.values()) * (parallel.pipeline - 1) / parallel.virtual
    return Phase(parts=parts | {"pipeline idle": idle})


def _of_stage(
    cfg: RunConfig,
    arch: Architecture,
    batch: PackedBatch,
    work: FlopCounts,
    stage: int,
    machine: Machine,
    backward: bool,
) -> dict[str, float]:
    """Return the seconds of one micro-batch on one rank of the stage, by cause."""
    model, parallel = cfg.model, cfg.parallel
    chunks = [len(chunk.layers) for chunk in stage_chunks(arch, model, parallel, stage)]
    flops = (lambda w: hardware_flops(w, model, chunks)) if backward else (lambda w: w.flops)
    linear, rest = replace(FlopCounts(), linear=work.linear), replace(work, linear=0.0)
    parts = {"compute": machine.compute(flops(rest), model.dtype)}
    parts["compute"] += machine.compute(
        flops(linear), model.dtype if model.fp8 == "none" else "fp8"
    )
    layers, again = sum(chunks), fraction_in_full(model, chunks)
    tensor, context = parallel.tensor, parallel.context
    reduces = layers * _tensor_passes(cfg, backward, again)
    gathers = layers * _context_passes(cfg, backward, again)
    messages = [  # bytes, span, calls, ranks
        (
            _tensor_bytes(cfg, arch, batch, reduces),
            tensor,
            reduces,
            tensor,
        ),
        (
            _context_bytes(cfg, arch, batch, gathers),
            tensor * context,
            gathers,
            context,
        ),
    ]
    if parallel.pipeline > 1:
        rows = batch.rows / parallel.context / (parallel.tensor if parallel.sequence else 1)
        sends = (1 + backward) * parallel.virtual
        sent_bytes = sends * rows * arch.hidden * dtype_bytes(model)
        messages.append((sent_bytes, machine.gpus // parallel.pipeline + 1, sends, 2))
    for num_bytes, span, calls, ranks in messages:
        name, seconds = machine.link(num_bytes, span, calls, ranks)
        parts[name] = parts.get(name, 0.0) + seconds
    return parts


def _tensor_bytes(cfg: RunConfig, arch: Architecture, batch: PackedBatch, passes: float) -> float:
    """Return the bytes that a rank sends in `passes` all-reduces, see `_tensor_passes`."""
    parallel = cfg.parallel
    whole = batch.rows / parallel.context * arch.hidden * dtype_bytes(cfg.model)
    return passes * 2 * (1 - 1 / parallel.tensor) * whole


def _tensor_passes(cfg: RunConfig, backward: bool, again: float) -> float:
    """Return the number of all-reduces of [rows, hidden] per layer; `again` of the layers are
    recomputed in full.

    A forward pass has two all-reduces, or two pairs of gather and scatter. With sequence
    parallelism the backward pass also gathers the inputs of trained weights again. The collectives
    of adapters are not counted.
    """
    gathers = cfg.parallel.sequence and cfg.model.trains_language
    return 2.0 + (2 + 2 * again + gathers) * backward


def _context_bytes(cfg: RunConfig, arch: Architecture, batch: PackedBatch, passes: float) -> float:
    """Return the bytes that a rank sends in `passes` gathers, see `_context_passes`."""
    parallel = cfg.parallel
    width = 2 * arch.kv_heads * arch.head_dim / parallel.tensor
    whole = batch.rows * width * dtype_bytes(cfg.model)
    return passes * (1 - 1 / parallel.context) * whole


def _context_passes(cfg: RunConfig, backward: bool, again: float) -> float:
    """Return the number of gathers of keys and values, and scatters of their gradients, per layer;
    `again` of the layers are recomputed in full."""
    return 1 + backward * (1 + again + (cfg.model.recompute == "selective"))


def optimizer_phase(
    cfg: RunConfig, counts: ParameterCounts, dp_ranks: int, machine: Machine
) -> Phase:
    """Return the seconds of gradient reduction, optimizer step and distribution of new weights.

    With `parallel.overlap` the reduction is hidden behind the backward pass. AdamW reads a
    gradient, the main weight and two moments, and writes the latter three and the weight.
    """
    parallel, number = cfg.parallel, dtype_bytes(cfg.model)
    trained = counts.trained(cfg.model)
    shares = dp_ranks if parallel.distributed_optimizer else 1
    parts = {"HBM": machine.hbm((7 * FLOAT32 + number) * trained / shares)}
    summed = FLOAT32 * trained * (1 if parallel.distributed_optimizer else 2)
    sent = 0 if parallel.overlap else summed
    sent += number * trained if parallel.distributed_optimizer else 0
    span = parallel.tensor * dp_ranks
    name, seconds = machine.link(sent * (1 - 1 / dp_ranks), span, calls=2, ranks=dp_ranks)
    if dp_ranks > 1:
        parts[name] = seconds
    if parallel.tensor > 1:  # tensor ranks hold partial gradients of the tower
        partial = counts.adapters if cfg.model.lora.rank else counts.vision + counts.merger
        tower = FLOAT32 * 2 * (1 - 1 / parallel.tensor) * partial
        frozen = cfg.model.freeze_vision and cfg.model.freeze_merger and not cfg.model.lora.rank
        name, seconds = machine.link(0.0 if frozen else tower, parallel.tensor)
        parts[name] = parts.get(name, 0.0) + seconds
    return Phase(parts=parts)
