"""Seconds of a step's phases, and what bounds each.

A phase is the sum of what does not overlap: products at a share of the peak (`mfu`), messages at a
share of a link's speed, memory read at a share of HBM's. The default of `mfu` is the lower end of
what Megatron publishes (41 to 48 % of an H100's peak in bfloat16, 37 % in FP8, whole steps): here
messages and the pipeline's idle time are counted beside it, and our layers are not fused. Nothing
of this has been measured by us on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, log2

from megatron_vrl.config import RunConfig
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.pipeline_split import stage_chunks
from megatron_vrl.models.qwen2_5_vl.flops import hardware_flops, work_of_sizes
from megatron_vrl.observe.throughput import Work
from megatron_vrl.planner.activations import FLOAT32, number_bytes
from megatron_vrl.planner.hardware import Gpu
from megatron_vrl.planner.parameters import Numbers
from megatron_vrl.planner.workload import Packed

DEFAULT_MFU = 0.40


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Seconds by what is waited for."""

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The part that takes the most."""
        return max(self.parts, key=lambda name: self.parts[name]) if self.seconds else "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    gpu: Gpu
    gpus: int
    mfu: float

    def compute(self, flops: float, dtype: str) -> float:
        peak = self.gpu.peak(dtype)
        assert peak is not None, f"{self.gpu.name} has no {dtype}"  # refused before
        return flops / (peak * self.mfu)

    def link(
        self, num_bytes: float, span: int, calls: float = 0, ranks: int = 1
    ) -> tuple[str, float]:
        """Name and seconds of the link that joins ranks within `span` neighbours: `calls` messages
        of `num_bytes` together, among `ranks`, each at least the latency of a tree of them."""
        inside = span <= self.gpu.per_node
        speed = self.gpu.nvlink if inside else self.gpu.network
        waits = calls * ceil(log2(ranks)) * self.gpu.latency
        seconds = num_bytes / (speed * self.gpu.link_share) + waits
        return "NVLink" if inside else "network", seconds

    def hbm(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.hbm * self.gpu.hbm_share)


def batch_work_of(arch: Architecture, batch: Packed) -> Work:
    """Of a micro-batch's groups, one forward pass over all ranks of the replica."""
    size = batch.of
    one = work_of_sizes(
        arch, size.prompt, [size.response] * size.answers, [size.grid] if size.grid else []
    )
    return scaled(one, batch.groups)


def scaled(work: Work, by: float) -> Work:
    return Work(
        tokens=round(work.tokens * by),
        linear=work.linear * by,
        attention=work.attention * by,
        head=work.head * by,
        vision=work.vision * by,
        merger=work.merger * by,
    )


def stage_work(cfg: RunConfig, arch: Architecture, work: Work, stage: int) -> Work:
    """The share of one rank of a pipeline stage."""
    parallel = cfg.parallel
    chunks = stage_chunks(arch, cfg.model, parallel, stage)
    layers = sum(len(chunk.layers) for chunk in chunks) / arch.layers
    embeds, ends = any(c.embeds for c in chunks), any(c.ends for c in chunks)
    own = Work(
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
    batch: Packed,
    micro_batches: int,
    machine: Machine,
    *,
    backward: bool,
) -> Phase:
    """All micro-batches through the pipeline: as long as its slowest stage, and the time in which
    that waits for the pipeline to fill and to drain (arXiv 2104.04473: (p - 1) / v of one
    micro-batch)."""
    parallel = cfg.parallel
    work = batch_work_of(arch, batch)
    stages = [
        _of_stage(cfg, arch, batch, stage_work(cfg, arch, work, stage), stage, machine, backward)
        for stage in range(parallel.pipeline)
    ]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    parts = {name: seconds * micro_batches for name, seconds in slowest.items()}
    idle = sum(slowest.values()) * (parallel.pipeline - 1) / parallel.virtual
    return Phase(parts=parts | {"pipeline idle": idle})


def _of_stage(
    cfg: RunConfig,
    arch: Architecture,
    batch: Packed,
    work: Work,
    stage: int,
    machine: Machine,
    backward: bool,
) -> dict[str, float]:
    """Seconds of one micro-batch on a rank of the stage."""
    model, parallel = cfg.model, cfg.parallel
    flops = (lambda w: hardware_flops(w, model)) if backward else (lambda w: w.flops)
    linear, rest = replace(Work(), linear=work.linear), replace(work, linear=0.0)
    parts = {"compute": machine.compute(flops(rest), model.dtype)}
    parts["compute"] += machine.compute(
        flops(linear), model.dtype if model.fp8 == "none" else "fp8"
    )
    layers = sum(len(c.layers) for c in stage_chunks(arch, model, parallel, stage))
    tensor, context = parallel.tensor, parallel.context
    messages = [  # bytes, span, calls, ranks
        (
            _tensor_bytes(cfg, arch, batch, layers, backward),
            tensor,
            layers * _tensor_passes(cfg, backward),
            tensor,
        ),
        (
            _context_bytes(cfg, arch, batch, layers, backward),
            tensor * context,
            layers * _context_passes(cfg, backward),
            context,
        ),
    ]
    if parallel.pipeline > 1:
        rows = batch.rows / parallel.context / (parallel.tensor if parallel.sequence else 1)
        handings = (1 + backward) * parallel.virtual
        handed = handings * rows * arch.hidden * number_bytes(model)
        messages.append((handed, machine.gpus // parallel.pipeline + 1, handings, 2))
    for num_bytes, span, calls, ranks in messages:
        name, seconds = machine.link(num_bytes, span, calls, ranks)
        parts[name] = parts.get(name, 0.0) + seconds
    return parts


def _tensor_bytes(
    cfg: RunConfig, arch: Architecture, batch: Packed, layers: int, backward: bool
) -> float:
    """Sent by a rank in its `_tensor_passes`."""
    parallel = cfg.parallel
    whole = batch.rows / parallel.context * arch.hidden * number_bytes(cfg.model)
    return layers * _tensor_passes(cfg, backward) * 2 * (1 - 1 / parallel.tensor) * whole


def _tensor_passes(cfg: RunConfig, backward: bool) -> float:
    """Two all-reduces of [rows, hidden] a layer and pass, or a gather and a scatter each; with
    sequence parallelism the backward pass gathers the inputs again."""
    again = 2 + 2 * (cfg.model.recompute == "full") + cfg.parallel.sequence
    return 2.0 + again * backward


def _context_bytes(
    cfg: RunConfig, arch: Architecture, batch: Packed, layers: int, backward: bool
) -> float:
    """Sent by a rank in its `_context_passes`."""
    parallel = cfg.parallel
    width = 2 * arch.kv_heads * arch.head_dim / parallel.tensor
    whole = batch.rows * width * number_bytes(cfg.model)
    return layers * _context_passes(cfg, backward) * (1 - 1 / parallel.context) * whole


def _context_passes(cfg: RunConfig, backward: bool) -> int:
    """Keys and values of a layer gathered, and their gradients scattered."""
    return 1 + backward * (1 + (cfg.model.recompute != "none"))


def optimizer_phase(cfg: RunConfig, numbers: Numbers, sharers: int, machine: Machine) -> Phase:
    """Gradients summed over the ranks that share parameters, the update, and the new weights.

    With `parallel.overlap` the sum hides behind the backward pass. AdamW reads a gradient, the main
    weight and two moments, writes the latter three and the weight.
    """
    parallel, number = cfg.parallel, number_bytes(cfg.model)
    trained = numbers.trained(cfg.model)
    shares = sharers if parallel.distributed_optimizer else 1
    parts = {"HBM": machine.hbm((7 * FLOAT32 + number) * trained / shares)}
    summed = FLOAT32 * trained * (1 if parallel.distributed_optimizer else 2)
    sent = 0 if parallel.overlap else summed
    sent += number * trained if parallel.distributed_optimizer else 0
    span = parallel.tensor * sharers
    name, seconds = machine.link(sent * (1 - 1 / sharers), span, calls=2, ranks=sharers)
    if sharers > 1:
        parts[name] = seconds
    if parallel.tensor > 1:  # each tensor rank saw its own steps of a video
        tower = FLOAT32 * 2 * (1 - 1 / parallel.tensor) * (numbers.vision + numbers.merger)
        frozen = cfg.model.freeze_vision and cfg.model.freeze_merger
        name, seconds = machine.link(0.0 if frozen else tower, parallel.tensor)
        parts[name] = parts.get(name, 0.0) + seconds
    return Phase(parts=parts)
