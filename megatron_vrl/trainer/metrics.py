"""Metrics of a GRPO step over all ranks: rewards, updates, throughput and MFU."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_vrl.algorithms import has_signal
from megatron_vrl.context import RunContext
from megatron_vrl.models.flops import (
    group_flops,
    hardware_flops,
    micro_batch_flops,
    padding_rows,
    plain_tokens,
    update_flops,
)
from megatron_vrl.models.pipeline_split import layer_counts
from megatron_vrl.observe.hardware import peak_bytes, peak_flops, reset_peak
from megatron_vrl.observe.throughput import FlopCounts, throughput_metrics
from megatron_vrl.parallel.mesh import gather_objects, world_axis
from megatron_vrl.policy.policy import Update
from megatron_vrl.trainer.experience import RolloutBatch
from megatron_vrl.trainer.update import UpdateResult
from megatron_vrl.types import Experience


def step_metrics(
    ctx: RunContext,
    rollout_batch: RolloutBatch,
    update_result: UpdateResult,
    seconds: Mapping[str, float],
    version: int,
) -> dict[str, Any]:
    """Return the metrics of a finished step. Every rank calls it.

    `version` identifies the weights that the step began with.
    """
    metrics: dict[str, Any] = answer_metrics(ctx, rollout_batch.experiences, version)
    metrics |= {
        "rollout/invalid_groups": float(len(rollout_batch.invalid)),
        "reward/errors": float(sum(map(len, rollout_batch.failures.values()))),
        "rollout/rounds": float(rollout_batch.rounds),
        "actor/groups_trained": float(sum(gather_objects(ctx.mesh.data, len(rollout_batch.kept)))),
        "actor/skipped_updates": float(sum(not update.applied for update in update_result.updates)),
    }
    if not update_result.updates:  # a step without trainable groups counts as one, too
        metrics["actor/skipped_updates"] = 1.0
    metrics |= _update_metrics(update_result.updates)
    return metrics | _throughput(ctx, update_result, seconds)


def answer_metrics(
    ctx: RunContext, experiences: Sequence[Experience], version: int
) -> dict[str, float]:
    """Return means over every answer of the step. Every rank calls it.

    `reward/std` is the mean over groups of the standard deviation of a group's rewards.
    `rollout/zero_iou_groups` is the fraction of groups in which no answer overlaps the truth, of
    the groups whose task scores `temporal_iou`.
    """
    own: dict[str, list[float]] = {}
    for experience in experiences:
        group = experience.scored
        rows = {f"reward/{name}": c.values.tolist() for name, c in group.components.items()}
        rows["reward/mean"] = group.total.tolist()
        rows["reward/std"] = [float(group.total.std())]
        rows["response_length/mean"] = [len(r.token_ids) for r in group.rollouts]
        rows["rollout/staleness"] = [float(version - r.weight_version) for r in group.rollouts]
        rows["response_length/clip_ratio"] = [float(r.finish == "length") for r in group.rollouts]
        rows["rollout/zero_variance_groups"] = [float(not has_signal(experience.advantages))]
        if (iou := group.components.get("temporal_iou")) is not None:
            rows["rollout/zero_iou_groups"] = [float(not iou.values.any())]
        for name, values in rows.items():
            own.setdefault(name, []).extend(values)
    everywhere = gather_objects(ctx.mesh.data, own)
    names = dict.fromkeys(name for rows in everywhere for name in rows)
    return {
        name: float(np.mean([v for rows in everywhere for v in rows.get(name, [])]))
        for name in names
    }


def _update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Return means over the step's updates, and maxima of names that end in "_max"."""
    rows = [{**_actor(u), **u.metrics} for u in updates]
    return {
        name: float((np.max if name.endswith("_max") else np.mean)([row[name] for row in rows]))
        for name in (rows[0] if rows else ())
    }


def _actor(update: Update) -> dict[str, float]:
    """Return loss, gradient norm and learning rate of an update."""
    return {
        "actor/loss": update.loss,
        "actor/grad_norm": update.grad_norm,
        "actor/lr": update.lr,
    }


def _throughput(
    ctx: RunContext, update_result: UpdateResult, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Return throughput, MFU and peak memory."""
    mesh, arch, cfg = ctx.mesh, ctx.arch, ctx.cfg.model
    batches, groups = update_result.batches, update_result.groups
    computed = sum((micro_batch_flops(arch, batch) for batch in batches), FlopCounts())
    ideal = sum((group_flops(arch, group) for group in groups), FlopCounts())
    packed = (computed, sum(padding_rows(batch) for batch in batches))
    asked = (ideal, plain_tokens(groups))
    # Context ranks compute parts of a micro-batch; all ranks of a replica hold the same groups.
    every_computed, padding = zip(*gather_objects(mesh.batch, packed), strict=True)
    every_ideal, plain = zip(*gather_objects(mesh.data, asked), strict=True)
    computed, ideal = sum(every_computed, FlopCounts()), sum(every_ideal, FlopCounts())
    chunks = layer_counts(arch, cfg, ctx.cfg.parallel)
    epochs, passes = ctx.cfg.grpo.epochs, update_result.passes
    # Outputs of a frozen tower are kept. Those that did not fit are not counted again.
    kept = cfg.freeze_vision and cfg.vision_output_cache_mib > 0
    repeats = kept * (epochs + passes - 1)
    on_gpu = mesh.device.type == "cuda"
    name = torch.cuda.get_device_name(mesh.device) if on_gpu else "CPU"
    peaks = gather_objects(world_axis(mesh), peak_bytes(mesh.device))
    reset_peak(mesh.device)
    return {"perf/peak_memory_gib": max(peaks) / 2**30} | throughput_metrics(
        computed=computed,
        ideal=ideal,
        plain_tokens=sum(plain),
        padding_rows=sum(padding),
        update_flops=epochs * update_flops(ideal, cfg)
        + passes * ideal.flops
        - repeats * ideal.vision,
        hardware_flops=epochs * hardware_flops(computed, cfg, chunks)
        + passes * computed.flops
        - repeats * computed.vision,
        seconds=seconds,
        ranks=mesh.world,
        peak=peak_flops(name, cfg.dtype if cfg.fp8 == "none" else "fp8"),
    )
