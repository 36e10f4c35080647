"""Plan of a configuration: violated rules, memory, FLOPs, and seconds of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_vrl.config import RunConfig, check_batches, check_off_policy
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.activations import Kernels
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.flops import hardware_flops, update_flops
from megatron_vrl.models.pipeline_split import check_divides, layer_counts
from megatron_vrl.parallel.mesh import check_layout
from megatron_vrl.planner.generation import (
    EngineMemory,
    encode_phase,
    engine_memory,
    rollout_phase,
    sync_phase,
)
from megatron_vrl.planner.hardware import GIB, Gpu
from megatron_vrl.planner.memory import (
    RESERVE,
    StageMemory,
    checkpoint_bytes,
    keeps_vision_outputs,
    stage_memory,
)
from megatron_vrl.planner.parameters import ParameterCounts, count_stage
from megatron_vrl.planner.speed import (
    DEFAULT_MFU,
    Machine,
    Phase,
    batch_flops,
    optimizer_phase,
    scaled,
    training_pass,
)
from megatron_vrl.planner.workload import (
    GroupSizes,
    PackedBatch,
    forward_passes,
    pack_step,
    row_multiple,
    scoring_passes,
    step_sizes,
    worst_batches,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Hardware and sizes that a configuration is planned for."""

    gpu: Gpu
    gpus: int
    mfu: float = DEFAULT_MFU
    prompt: int | None = None  # prompt tokens; None: the maximum that the config allows
    response: int | None = None  # response tokens; None: the maximum
    clip_s: float | None = None  # length of a video in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of one GPU of each pipeline stage, in bytes."""

    stages: Sequence[StageMemory]
    checkpoint_host: Sequence[int]  # host memory of a save, for one rank of each stage
    engine: EngineMemory
    colocated: bool
    usable: int  # memory of a GPU without the reserve

    def rollout(self, stage: int) -> int:
        """Return the memory during generation. A colocated engine reserves its whole
        `rollout.gpu_memory_utilization`."""
        engine = self.engine.total if self.colocated else 0
        return self.stages[stage].persistent + engine

    def peak(self, stage: int) -> int:
        """Return the larger of the peaks of update and rollout."""
        return max(self.stages[stage].update, self.rollout(stage))

    @property
    def most(self) -> int:
        """Return the peak over all stages."""
        return max(map(self.peak, range(len(self.stages))))

    @property
    def first_worker_gpu(self) -> int:
        """Return the peak of a weight sync on a worker's first GPU; 0 if engines are colocated."""
        return 0 if self.colocated else self.engine.total + self.engine.sync

    @property
    def fits(self) -> bool:
        """Return True if no GPU needs more than it has and the longest answer can be sampled."""
        engine = self.engine
        peak = max(self.most, self.first_worker_gpu)
        return peak <= self.usable and engine.kv_cache >= engine.longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Memory, FLOPs and seconds of one training step."""

    replicas: int
    sizes: GroupSizes
    batch: PackedBatch
    micro_batches: int  # per update and replica
    stages: Sequence[ParameterCounts]  # parameters on one rank of each pipeline stage
    memory: Memory
    tokens: int  # tokens of a step; with `batch.layout: shared` a prompt counts once
    model_flops: float  # model FLOPs of a step's updates
    hardware_flops: float  # FLOPs of all passes of the trainer, with recompute
    phases: Mapping[str, Phase]
    overlapped: bool  # workers generate the next step's answers during training
    refused: Sequence[str]  # one sentence for each shortage of memory

    @property
    def seconds(self) -> float:
        """Return the seconds of a step. Decoding of the next step's videos overlaps with
        training."""
        seconds = {name: phase.seconds for name, phase in self.phases.items()}
        encode, rollout = seconds.pop("encode"), seconds.pop("rollout")
        trains = max(encode, sum(seconds.values()))
        return max(trains, rollout) if self.overlapped else trains + rollout


def num_workers(cfg: RunConfig) -> int:
    """Return the number of rollout workers in the config; 0 for other placements."""
    rollout = cfg.rollout
    return max(rollout.min_workers, len(rollout.workers)) if rollout.placement == "workers" else 0


def worker_gpus(cfg: RunConfig) -> int:
    """Return the number of GPUs of the rollout workers, which the trainer does not use."""
    return num_workers(cfg) * cfg.rollout.tensor


def refusals(cfg: RunConfig, arch: Architecture, gpu: Gpu, gpus: int) -> list[str]:
    """Return the message of every layout rule that the configuration violates."""
    parallel = cfg.parallel
    replicas = gpus // (parallel.tensor * parallel.context * parallel.pipeline)
    rules = (
        lambda: check_layout(parallel, gpus),
        lambda: check_divides(arch, cfg.model, parallel),
        lambda: check_batches(cfg, max(1, replicas)),
        lambda: check_off_policy(cfg),
        lambda: _check_units(cfg, gpu),
    )
    messages = []
    for rule in rules:
        try:
            rule()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def _check_units(cfg: RunConfig, gpu: Gpu) -> None:
    """Raise ConfigError if the GPU cannot compute in the configured dtype."""
    if cfg.model.fp8 != "none" and gpu.peak("fp8") is None:
        raise ConfigError(
            f"model.fp8={cfg.model.fp8}, but --gpu {gpu.name} has no FP8 units: set "
            "model.fp8=none, or plan for another GPU."
        )
    if gpu.peak(cfg.model.dtype) is None:
        raise ConfigError(
            f"model.dtype={cfg.model.dtype}, but the measured machine {gpu.name} has no rate for "
            f"it: set model.dtype to one of {', '.join(gpu.flops)}."
        )


def plan_memory(cfg: RunConfig, arch: Architecture, request: PlanRequest) -> Memory:
    """Return the memory of a layout that has no refusals."""
    parallel = cfg.parallel
    replicas = request.gpus // (parallel.tensor * parallel.context * parallel.pipeline)
    sizes = step_sizes(cfg, family_of(arch), request.prompt, request.response)
    multiple = row_multiple(cfg)
    _, micro_batches = pack_step(cfg, sizes, replicas, multiple)
    given = request.response is not None
    worst = list(worst_batches(cfg, family_of(arch), sizes, multiple, given))
    # Of torch's attention kernels, only cuDNN's (bfloat16, not deterministic) supports a mask
    # together with fewer key heads than query heads. Other kernels store the scores.
    scores = cfg.model.dtype == "float32" or cfg.run.deterministic
    kernels = Kernels(scores=scores and arch.kv_heads < arch.heads)
    dp_ranks = replicas * parallel.context
    return Memory(
        stages=[
            stage_memory(cfg, arch, stage, dp_ranks, worst, micro_batches, kernels)
            for stage in range(parallel.pipeline)
        ],
        checkpoint_host=[
            checkpoint_bytes(cfg, count_stage(arch, cfg.model, parallel, stage), dp_ranks)
            for stage in range(parallel.pipeline)
        ],
        engine=engine_memory(cfg, arch, sizes, request.gpu.memory),
        colocated=cfg.rollout.placement == "colocated",
        usable=int(request.gpu.memory * (1 - RESERVE)),
    )


def make_plan(cfg: RunConfig, arch: Architecture, request: PlanRequest) -> Plan:
    """Return the plan of a layout that has no refusals; `Plan.refused` lists shortages of
    memory."""
    parallel = cfg.parallel
    replicas = request.gpus // (parallel.tensor * parallel.context * parallel.pipeline)
    sizes = step_sizes(cfg, family_of(arch), request.prompt, request.response)
    batch, micro_batches = pack_step(cfg, sizes, replicas, row_multiple(cfg))
    memory = plan_memory(cfg, arch, request)
    stages = [count_stage(arch, cfg.model, parallel, s) for s in range(parallel.pipeline)]
    step = scaled(batch_flops(arch, batch), micro_batches * replicas * cfg.grpo.mini_batches)
    epochs = cfg.grpo.epochs
    passes = forward_passes(cfg)
    chunks = layer_counts(arch, cfg.model, parallel)
    forward = len(passes) + len(scoring_passes(cfg))
    computed = epochs * hardware_flops(step, cfg.model, chunks) + forward * step.flops
    if keeps_vision_outputs(cfg, arch, batch, micro_batches * cfg.grpo.mini_batches):
        computed -= (epochs + len(passes) - 1) * step.vision
    return Plan(
        replicas=replicas,
        sizes=sizes,
        batch=batch,
        micro_batches=micro_batches,
        stages=stages,
        memory=memory,
        tokens=step.tokens,
        model_flops=epochs * update_flops(step, cfg.model),
        hardware_flops=computed,
        phases=_phases(cfg, arch, request, sizes, batch, micro_batches, stages, memory),
        overlapped=cfg.rollout.max_staleness > 0,
        refused=list(_shortages(cfg, request, memory)),
    )


def _phases(
    cfg: RunConfig,
    arch: Architecture,
    request: PlanRequest,
    sizes: GroupSizes,
    batch: PackedBatch,
    micro_batches: int,
    stages: Sequence[ParameterCounts],
    memory: Memory,
) -> dict[str, Phase]:
    """Return the phases of a step by name."""
    parallel, gpus = cfg.parallel, request.gpus
    machine = Machine(gpu=request.gpu, gpus=gpus, mfu=request.mfu)
    engines = num_workers(cfg) or gpus
    count = micro_batches * cfg.grpo.mini_batches
    updates = cfg.grpo.mini_batches * cfg.grpo.epochs
    dp_ranks = gpus // (parallel.tensor * parallel.pipeline)
    again = not keeps_vision_outputs(cfg, arch, batch, count)  # the tower runs in every pass
    passes = [*scoring_passes(cfg), *forward_passes(cfg)]
    first = len(scoring_passes(cfg))  # pass whose vision outputs are kept
    forward = [
        training_pass(
            cfg, arch, batch, count, machine, backward=False, encodes=again or number <= first
        )
        for number in range(len(passes))
    ]
    both = training_pass(cfg, arch, batch, micro_batches, machine, backward=True, encodes=again)
    ends = [optimizer_phase(cfg, counts, dp_ranks, machine) for counts in stages]
    slowest = max(ends, key=lambda phase: phase.seconds)
    return {
        "encode": encode_phase(cfg, request.clip_s, machine),
        "sync": sync_phase(cfg, arch, machine),
        "rollout": rollout_phase(cfg, arch, sizes, memory.engine, engines, machine),
        **dict(zip(passes, forward, strict=True)),
        "update": _times(both, updates),
        "optimizer": _times(slowest, updates),
    }


def _times(phase: Phase, count: int) -> Phase:
    """Return `count` repetitions of `phase`."""
    return Phase(parts={name: seconds * count for name, seconds in phase.parts.items()})


def _shortages(cfg: RunConfig, request: PlanRequest, memory: Memory) -> Iterator[str]:
    """Yield one sentence for each shortage of memory."""
    of = f"{memory.usable / GIB:.1f} GiB that a {request.gpu.name} has available"
    for number, stage in enumerate(memory.stages):
        if stage.update > memory.usable:
            yield (
                f"An update needs {stage.update / GIB:.1f} GiB on each GPU of pipeline stage "
                f"{number}, more than the {of}; the largest part is {_largest(stage)}."
            )
    engine, key = (
        memory.engine,
        f"rollout.gpu_memory_utilization={cfg.rollout.gpu_memory_utilization:g}",
    )
    if engine.kv_cache < engine.longest:
        yield (
            f"{key} of a {request.gpu.name} leaves {engine.kv_cache / GIB:.1f} GiB for keys and "
            f"values beside an engine's {engine.weights / GIB:.1f} GiB of weights, and the longest "
            f"answer alone needs {engine.longest / GIB:.1f} GiB."
        )
    if memory.first_worker_gpu > memory.usable:
        taken = memory.first_worker_gpu / GIB
        yield (
            f"During a weight sync a worker's first GPU holds {taken:.1f} GiB, more than the "
            f"{of}: {key} of it, and {engine.sync / GIB:.1f} GiB for the buckets of all its "
            "processes; lower it."
        )
    rollout = max(map(memory.rollout, range(len(memory.stages))))
    if memory.colocated and rollout > memory.usable:
        yield (
            f"While the colocated engine answers, a GPU holds {rollout / GIB:.1f} GiB, more than "
            f"the {of}: {key} of it beside weights, gradients and optimizer."
        )


def _largest(stage: StageMemory) -> str:
    """Return name and size of the largest part of a stage's memory."""
    parts = {name: getattr(stage, name) for name in StageMemory.__dataclass_fields__}
    name = max(parts, key=lambda part: parts[part])
    return f"{name.replace('_', ' ')}, {parts[name] / GIB:.1f} GiB"
