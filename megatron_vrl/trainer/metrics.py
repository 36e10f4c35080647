"""A GRPO step's numbers over all ranks: rewards, updates, and how well the hardware was used."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_vrl.algorithms import teaches
from megatron_vrl.context import Parts
from megatron_vrl.models.qwen2_5_vl.flops import (
    batch_work,
    group_work,
    hardware_flops,
    padding_rows,
    plain_tokens,
    update_flops,
)
from megatron_vrl.observe.hardware import forget_peak, peak_bytes, peak_flops
from megatron_vrl.observe.throughput import Work, step_meters
from megatron_vrl.parallel.mesh import gather_objects, world_axis
from megatron_vrl.policy.policy import Update
from megatron_vrl.trainer.experience import Collected
from megatron_vrl.trainer.update import Learned
from megatron_vrl.types import Experience


def step_numbers(
    parts: Parts,
    collected: Collected,
    learned: Learned,
    seconds: Mapping[str, float],
    version: int,
) -> dict[str, Any]:
    """Every rank calls it, after the step; `version` names the weights that it began with."""
    numbers: dict[str, Any] = answer_numbers(parts, collected.experiences, version)
    numbers |= {
        "invalid_groups": float(len(collected.invalid)),
        "reward_errors": float(sum(map(len, collected.failures.values()))),
        "rollout_rounds": float(collected.rounds),
        "groups_trained": float(sum(gather_objects(parts.mesh.data, len(collected.kept)))),
        "updates_left_out": float(sum(not update.applied for update in learned.updates)),
    }
    if not learned.updates:  # nothing to learn from: that, too, is an update left out
        numbers["updates_left_out"] = 1.0
    numbers |= _of_updates(learned.updates)
    return numbers | _meters(parts, learned, seconds)


def answer_numbers(
    parts: Parts, experiences: Sequence[Experience], version: int
) -> dict[str, float]:
    """Means over every answer of the step."""
    own: dict[str, list[float]] = {}
    for experience in experiences:
        group = experience.scored
        rows = {f"parts/{name}": values.tolist() for name, values in group.parts.items()}
        rows["format_rate"] = rows["parts/format"]
        rows["reward"] = group.rewards.tolist()
        rows["response_tokens"] = [len(r.token_ids) for r in group.rollouts]
        rows["staleness"] = [float(version - r.weight_version) for r in group.rollouts]
        rows["truncated_share"] = [float(r.finish == "length") for r in group.rollouts]
        rows["uniform_groups"] = [float(not teaches(experience.advantages))]
        for name, values in rows.items():
            own.setdefault(name, []).extend(values)
    everywhere = gather_objects(parts.mesh.data, own)
    names = dict.fromkeys(name for rows in everywhere for name in rows)
    return {
        name: float(np.mean([v for rows in everywhere for v in rows.get(name, [])]))
        for name in names
    }


def _of_updates(updates: Sequence[Update]) -> dict[str, float]:
    """Means over the step's updates, of names that end in "_max" the largest."""
    rows = [{"loss": u.loss, "grad_norm": u.grad_norm, "lr": u.lr, **u.metrics} for u in updates]
    return {
        name: float((np.max if name.endswith("_max") else np.mean)([row[name] for row in rows]))
        for name in (rows[0] if rows else ())
    }


def _meters(parts: Parts, learned: Learned, seconds: Mapping[str, float]) -> dict[str, float]:
    mesh, arch, cfg = parts.mesh, parts.arch, parts.cfg.model
    batches, groups = learned.batches, learned.groups
    computed = sum((batch_work(arch, batch) for batch in batches), Work())
    ideal = sum((group_work(arch, group) for group in groups), Work())
    packed = (computed, sum(padding_rows(batch) for batch in batches))
    asked = (ideal, plain_tokens(groups))
    # Context ranks compute parts of a micro-batch; all ranks of a replica hold the same groups.
    every_computed, padding = zip(*gather_objects(mesh.batch, packed), strict=True)
    every_ideal, plain = zip(*gather_objects(mesh.data, asked), strict=True)
    computed, ideal = sum(every_computed, Work()), sum(every_ideal, Work())
    epochs, passes = parts.cfg.grpo.epochs, learned.passes
    on_gpu = mesh.device.type == "cuda"
    name = torch.cuda.get_device_name(mesh.device) if on_gpu else "CPU"
    peaks = gather_objects(world_axis(mesh), peak_bytes(mesh.device))
    forget_peak(mesh.device)
    return {"peak_memory_gib": max(peaks) / 2**30} | step_meters(
        computed=computed,
        ideal=ideal,
        plain_tokens=sum(plain),
        padding_rows=sum(padding),
        update_flops=epochs * update_flops(ideal, cfg) + passes * ideal.flops,
        hardware_flops=epochs * hardware_flops(computed, cfg) + passes * computed.flops,
        seconds=seconds,
        ranks=mesh.world,
        peak=peak_flops(name, cfg.dtype if cfg.fp8 == "none" else "fp8"),
    )
