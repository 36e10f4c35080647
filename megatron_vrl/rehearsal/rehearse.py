"""Update of one rank on fake tensors: build, passes, reduction of gradients, all counted.

The code is that of a run: `Policy`, Megatron's wrapper and schedule, the packer, the loss. Left
out: the optimizer's step and the means of metrics, which read from the GPU after the passes; the
rollout, the weight sync and checkpoints.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from megatron_vrl.algorithms import token_loss
from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.config import RunConfig
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.qwen2_5_vl import inputs
from megatron_vrl.models.qwen2_5_vl.activations import Kernels
from megatron_vrl.parallel.fake import fake_rank
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.planner.memory import StageMemory, stage_memory
from megatron_vrl.planner.workload import PackedBatch, packed_sizes, step_sizes
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.rehearsal.groups import planned_group
from megatron_vrl.rehearsal.recorder import Recorder

AXES = ("tensor", "context", "data", "pipeline", "vision", "batch", "alone")
ON_HOST = ((inputs, "rotary_angles"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Counts of one rank."""

    rank: int
    stage: int
    rows: int  # packed rows of a micro-batch, of all context-parallel ranks
    micro_batches: int
    memory: dict[str, tuple[int, int]]  # name -> bytes rehearsed, bytes planned
    layers: dict[str, int]  # part -> layers of this rank
    operations: dict[str, dict[str, int]]  # phase -> part -> operations
    collectives: list[dict[str, Any]]  # operation, axis, calls, bytes


def rehearse(
    cfg: RunConfig, arch: Architecture, rank: int, world: int, micro_batches: int | None = None
) -> Rehearsal:
    """Return the counts of `rank` among `world` ranks.

    The process must have loaded the fake GPU. `micro_batches` None: one for one stage, else twice
    as many as stages, with which every stage holds as many activations as it ever will.
    """
    parallel = cfg.parallel
    count = micro_batches or (2 * parallel.pipeline if parallel.pipeline > 1 else 1)
    with fake_rank(parallel, rank, world, cfg.model.fp8, ON_HOST) as mesh:
        recorder = Recorder(_axis_names(mesh))
        with recorder:
            policy, sizes = _built(cfg, arch, mesh, recorder)
            batches, packed = _batches(cfg, arch, mesh, count)
            with _phases(policy, recorder):
                _update(cfg, policy, batches, recorder)
        planned = stage_memory(
            cfg,
            arch,
            mesh.pipeline.rank,
            mesh.batch.size,
            [packed],
            count,
            Kernels(scores=cfg.model.dtype == "float32" and arch.kv_heads < arch.heads),
        )
        return Rehearsal(
            rank=rank,
            stage=mesh.pipeline.rank,
            rows=packed.rows,
            micro_batches=len(batches),
            memory=_memory(sizes, recorder, planned),
            layers=_layers(policy),
            operations=_by_phase(recorder),
            collectives=_collectives(recorder),
        )


def _memory(
    sizes: dict[str, int], recorder: Recorder, planned: StageMemory
) -> dict[str, tuple[int, int]]:
    """Return name -> (bytes rehearsed, bytes planned).

    The planned peaks have the parts that a rehearsal has: no optimizer, runtime, decoder, graphs.
    """
    held = planned.weights + planned.gradients + planned.reference
    passes = planned.activations + planned.vision + max(planned.log_probs, planned.working)
    memory = {name: (found, getattr(planned, name)) for name, found in sizes.items()}
    peaks = {phase: recorder.peak[phase] for phase in ("forward", "backward")}
    return memory | {
        "peak of forward passes": (peaks["forward"], 0),
        "peak of backward passes": (peaks["backward"], 0),
        "peak of both": (max(peaks.values()), held + passes),
    }


def _layers(policy: Policy) -> dict[str, int]:
    """Return the number of vision and language layers of this rank."""
    towers = [chunk.vision for chunk in policy.chunks if chunk.vision is not None]
    return {
        "vision": sum(len(tower.blocks.layers) for tower in towers),
        "language": sum(len(chunk.language.decoder.layers) for chunk in policy.chunks),
    }


def _axis_names(mesh: Mesh) -> dict[str, str]:
    """Return the axis of each process group's name; the first of AXES wins."""
    groups = {name: getattr(mesh, name) for name in AXES}
    named = {name: getattr(axis, "group", axis).group_name for name, axis in groups.items()}
    return {group: name for name, group in reversed(named.items())}


def _built(
    cfg: RunConfig, arch: Architecture, mesh: Mesh, recorder: Recorder
) -> tuple[Policy, dict[str, int]]:
    """Return the policy, and bytes of weights, gradients and reference model."""
    policy = Policy(arch, cfg.model, cfg.parallel, mesh)
    before = recorder.live
    if cfg.algorithm.kl > 0:
        policy.keep_reference()
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parameters}
    buffers = [b for wrapped in policy._ddp for b in wrapped.buffers]
    return policy, {
        "weights": sum(storages.values()),
        "gradients": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
        "reference": recorder.live - before,
    }


def _batches(
    cfg: RunConfig, arch: Architecture, mesh: Mesh, count: int
) -> tuple[list[MicroBatch], PackedBatch]:
    """Return `count` micro-batches of as many planned groups as the token budget holds."""
    sizes = step_sizes(cfg)
    group = planned_group(arch, sizes)
    piece, pieces = packed_sizes(cfg, sizes)
    fit = max(1, cfg.batch.tokens // piece.rows)
    own = max(1, cfg.rollout.prompts_per_step * pieces // mesh.data.size // cfg.grpo.mini_batches)
    members = min(fit, own)
    groups = [group] * (-(-members * count // pieces))
    batches = plan_batches(groups, group, cfg.batch, mesh)[:count]
    return batches, PackedBatch(group=piece, groups=members, rows=len(batches[0].token_ids))


def _update(
    cfg: RunConfig, policy: Policy, batches: Sequence[MicroBatch], recorder: Recorder
) -> None:
    """Run the passes of `Policy.update`, and of the reference model before them."""
    of = Distribution(temperature=cfg.rollout.temperature)
    references: Sequence[Tensor | None] = [None] * len(batches)
    if cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "loss":
        recorder.phase, recorder.in_pass = "reference", True
        references = policy.reference_logprobs(batches, of)
    loss = partial(token_loss, cfg=cfg.algorithm)
    jobs = [
        (batch, partial(policy._weighted, loss, None, kept))
        for batch, kept in zip(batches, references, strict=True)
    ]
    for wrapped in policy._ddp:
        wrapped.zero_grad_buffer()
    recorder.in_pass = True
    with policy._reducing_gradients():
        policy._run(policy._ddp, jobs, of)
    recorder.in_pass = False


@contextmanager
def _phases(policy: Policy, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder, in this block, which phase and layer an operation belongs to.

    A layer's backward pass begins with the gradient of its output, and ends with that of its input.
    """
    hooks = []
    for chunk in policy.chunks:
        hooks.append(chunk.register_forward_pre_hook(lambda *_: recorder.enter("forward")))
        hooks.append(chunk.register_forward_hook(lambda *_: recorder.enter("backward")))
        layers = {"language layers": chunk.language.decoder.layers}
        if chunk.vision is not None:
            layers["vision layers"] = chunk.vision.blocks.layers
        for part, modules in layers.items():
            for layer in modules:
                hooks.append(
                    layer.register_forward_pre_hook(_begins(recorder, part), with_kwargs=True)
                )
                hooks.append(layer.register_forward_hook(_ends(recorder, part)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _begins(recorder: Recorder, part: str) -> Any:
    def begin(module: Any, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        _switch(recorder, given, "rest")
        recorder.part = part

    return begin


def _ends(recorder: Recorder, part: str) -> Any:
    def end(module: Any, args: Any, out: Any) -> None:
        _switch(recorder, out[0] if isinstance(out, tuple) else out, part)
        recorder.part = "rest"

    return end


def _switch(recorder: Recorder, tensor: Tensor, part: str) -> None:
    """Set the part when the gradient of `tensor` is there."""
    if tensor.requires_grad:
        tensor.register_hook(lambda _: setattr(recorder, "part", part))


def _by_phase(recorder: Recorder) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (phase, part), count in recorder.operations.items():
        found.setdefault(phase, {})[part] = count
    return found


def _collectives(recorder: Recorder) -> list[dict[str, Any]]:
    return [
        {"operation": name, "axis": axis, "calls": calls, "bytes": recorder.bytes_sent[name, axis]}
        for (name, axis), calls in sorted(recorder.calls.items())
    ]
