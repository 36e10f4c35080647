"""Update of one rank on fake tensors: build, passes, reduction of gradients, optimizer step.

The code is that of a run: `Policy.update`, Megatron's wrapper, schedule and optimizer, the packer,
the loss. Left out: the rollout, the weight sync and checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from megatron_vrl.algorithms import token_loss
from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.config import RunConfig
from megatron_vrl.models import logprob_head, vision_inputs
from megatron_vrl.models.activations import Kernels
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.fake import fake_rank
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.planner.collectives import Collectives, update_collectives
from megatron_vrl.planner.memory import StageMemory, stage_memory
from megatron_vrl.planner.workload import PackedBatch, forward_passes
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.rehearsal.groups import planned_group
from megatron_vrl.rehearsal.recorded_policy import RecordedPolicy
from megatron_vrl.rehearsal.recorder import Recorder

AXES = ("tensor", "context", "data", "pipeline", "vision", "batch", "alone")
ON_HOST = ((vision_inputs, "rotary_angles"),)
COMPILED = (
    (logprob_head, "exponential_sums", lambda logits, scratch, peak: (peak.clone(), peak.clone())),
    (logprob_head, "slope_of_softmax", lambda logits, *_: logits.neg_()),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Counts of one rank."""

    rank: int
    stage: int
    rows: int  # packed rows of a micro-batch, of all context-parallel ranks
    micro_batches: int
    memory: dict[str, tuple[int, int]]  # name -> bytes rehearsed, bytes planned
    peaks: dict[str, int]  # phase -> most live bytes
    layers: dict[str, int]  # part -> layers of this rank
    operations: dict[str, dict[str, int]]  # phase -> part -> operations
    host_reads: int  # after the passes
    collectives: list[dict[str, Any]]  # phase, operation, axis; calls and bytes: rehearsed, planned


def default_micro_batches(cfg: RunConfig) -> int:
    """Return 1 for one stage, else twice as many as stages: with these every stage holds as many
    activations as it ever will."""
    return 2 * cfg.parallel.pipeline if cfg.parallel.pipeline > 1 else 1


def without_transformer_engine(cfg: RunConfig) -> RunConfig:
    """Return `cfg` with Megatron's layers in bfloat16 in place of Transformer Engine's and FP8.

    Transformer Engine's kernels have no fake form.
    """
    model = cfg.model
    if "transformer_engine" not in (model.layers, model.attention):
        return cfg
    other = {"layers": "megatron", "attention": "auto", "fp8": "none"}
    return cfg.model_copy(update={"model": model.model_copy(update=other)})


def rehearse(
    cfg: RunConfig, arch: Architecture, batch: PackedBatch, rank: int, world: int, count: int
) -> Rehearsal:
    """Return the counts of `rank` among `world` ranks, with `count` micro-batches like `batch`.

    The process must have loaded the fake GPU.
    """
    parallel = cfg.parallel
    with fake_rank(parallel, rank, world, cfg.model.fp8, ON_HOST, COMPILED) as mesh:
        cfg = without_transformer_engine(cfg)
        recorder = Recorder(_axis_names(mesh))
        with recorder:
            policy, sizes = _built(cfg, arch, mesh, recorder)
            every = _batches(cfg, arch, mesh, batch, count * cfg.grpo.mini_batches)
            _update(cfg, policy, [every[at : at + count] for at in range(0, len(every), count)])
        kernels = Kernels(scores=cfg.model.dtype == "float32" and arch.kv_heads < arch.heads)
        stage, dp_ranks = mesh.pipeline.rank, mesh.batch.size
        planned = stage_memory(cfg, arch, stage, dp_ranks, [batch], count, kernels)
        expected = update_collectives(cfg, arch, batch, stage, dp_ranks, count, mesh.context.rank)
        return Rehearsal(
            rank=rank,
            stage=stage,
            rows=batch.rows,
            micro_batches=count,
            memory=_memory(sizes, recorder, planned),
            peaks=dict(recorder.peak),
            layers=_layers(policy),
            operations=_by_phase(recorder),
            host_reads=sum(recorder.host_reads.values()),
            collectives=_collectives(recorder, expected),
        )


def _memory(
    sizes: dict[str, int], recorder: Recorder, planned: StageMemory
) -> dict[str, tuple[int, int]]:
    """Return name -> (bytes rehearsed, bytes planned).

    The planned peak has the parts that a rehearsal has: no runtime, decoder, buffers, graphs.
    `passes` is what the passes hold beside the first four, at the most.
    """
    held = sum(sizes.values())
    passes = max(peak for phase, peak in recorder.peak.items() if phase in PASSES) - held
    update = max(peak for phase, peak in recorder.peak.items() if phase in (*PASSES, "step"))
    planned_held = sum(getattr(planned, name) for name in sizes)
    planned_passes = planned.before + planned.passes
    planned_update = planned_held + max(planned_passes, planned.before + planned.stepping)
    memory = {name: (found, getattr(planned, name)) for name, found in sizes.items()}
    return memory | {
        "passes": (passes, planned_passes),
        "update": (update, planned_update),
    }


PASSES = ("old log-probs", "reference", "forward", "backward")


def _layers(policy: RecordedPolicy) -> dict[str, int]:
    """Return the number of vision and language layers of this rank."""
    towers = [chunk.vision for chunk in policy.chunks if chunk.vision is not None]
    return {
        "vision": sum(len(tower.layers()) for tower in towers),
        "language": sum(len(chunk.language.decoder.layers) for chunk in policy.chunks),
    }


def _axis_names(mesh: Mesh) -> dict[str, str]:
    """Return the axis of each process group's name; the first of AXES wins."""
    groups = {name: getattr(mesh, name) for name in AXES}
    named = {name: getattr(axis, "group", axis).group_name for name, axis in groups.items()}
    return {group: name for name, group in reversed(named.items())}


def _built(
    cfg: RunConfig, arch: Architecture, mesh: Mesh, recorder: Recorder
) -> tuple[RecordedPolicy, dict[str, int]]:
    """Return the policy, and bytes of weights, gradients, optimizer state and reference model."""
    policy = RecordedPolicy(arch, cfg.model, cfg.parallel, mesh)
    policy.recorder = recorder
    before = recorder.live
    policy.start_phase(cfg.grpo.optimizer, cfg.grpo.steps)
    optimizer = recorder.live - before
    before = recorder.live
    if cfg.algorithm.kl > 0:
        policy.keep_reference()
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parameters}
    buffers = [b for wrapped in policy._ddp for b in wrapped.buffers]
    return policy, {
        "weights": sum(storages.values()),
        "gradients": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
        "optimizer": optimizer,
        "reference": recorder.live - before,
    }


def _batches(
    cfg: RunConfig, arch: Architecture, mesh: Mesh, batch: PackedBatch, count: int
) -> list[MicroBatch]:
    """Return `count` micro-batches like `batch`."""
    pieces = cfg.rollout.group_size // batch.group.answers  # that the packer makes of a group
    group = planned_group(arch, replace(batch.group, answers=batch.group.answers * pieces))
    groups = [group] * (-(-batch.groups * count // pieces))
    batches = plan_batches(groups, group, cfg.batch, mesh)[:count]
    found = len(batches[0].token_ids)
    assert found == batch.rows, f"the packer made {found} rows, the plan has {batch.rows}"
    return batches


def _update(
    cfg: RunConfig, policy: RecordedPolicy, mini_batches: Sequence[Sequence[MicroBatch]]
) -> None:
    """Run the forward passes over all `mini_batches`, and the update of the first."""
    of = Distribution(temperature=cfg.rollout.temperature)
    run = {"old log-probs": policy.logprobs, "reference": policy.reference_logprobs}
    before = forward_passes(cfg)
    found: dict[str, list[Sequence[Tensor | None]]] = {name: [] for name in before}
    with policy.vision_outputs.kept(len(before) + cfg.grpo.epochs):
        for name in before:
            for batches in mini_batches:
                policy.recorder.enter(name)
                found[name].append(run[name](batches, of))
        policy.recorder.enter("forward")
        old, reference = (found[name][0] if name in found else None for name in run)
        loss = partial(token_loss, cfg=cfg.algorithm)
        policy.update(mini_batches[0], loss, of, 0, old=old, reference=reference)


def _by_phase(recorder: Recorder) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (phase, part), count in recorder.operations.items():
        found.setdefault(phase, {})[part] = count
    return found


def _collectives(recorder: Recorder, planned: Collectives) -> list[dict[str, Any]]:
    """Return the collectives that were recorded or planned, by phase, operation and axis."""
    found = Collectives()
    for (phase, operation, axis), calls in recorder.calls.items():
        merged = "passes" if phase in ("forward", "backward") else phase
        found.calls[merged, operation, axis] += calls
        found.bytes[merged, operation, axis] += recorder.bytes_sent[phase, operation, axis]
    return [
        {
            "phase": key[0],
            "operation": key[1],
            "axis": key[2],
            "calls": (found.calls[key], planned.calls[key]),
            "bytes": (found.bytes[key], planned.bytes[key]),
        }
        for key in sorted(found.calls.keys() | planned.calls.keys())
    ]
