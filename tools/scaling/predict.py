"""The planner's seconds of a cell, on the machine that was measured.

One number is fitted, for each size: `mfu`, the share of the measured matrix product's rate that the
fastest update of one rank reached. All else is the planner's arithmetic with the
measured bandwidths and latency. Ranks that share a core share its rate, in which the planner knows
no bubble: a core that one stage leaves idle computes for another.
"""

from typing import Any

from megatron_vrl.config import Model, Run, RunConfig
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.planner.hardware import Gpu
from megatron_vrl.planner.parameters import count_stage
from megatron_vrl.planner.speed import Machine, Phase, optimizer_phase, training_pass
from megatron_vrl.planner.workload import GroupSizes, PackedBatch
from scaling.grid import Cell, Work, micro_batches

TEXT_TOKENS = 81  # of the prompt that benches/update.py makes, around its video
IDLE = "pipeline idle"  # the planner's word


def model_of(work: Work, checkpoint: str = "none") -> Model:
    return Model(
        checkpoint=checkpoint,
        dtype=work.dtype,
        recompute=work.recompute,
        recompute_vision="full" if work.recompute == "full" else "none",
        layers=work.layers,
        attention=work.attention,
        freeze_vision=work.freeze_vision,
        freeze_merger=work.freeze_vision,
    )


def sizes_of(work: Work) -> GroupSizes:
    grid = (work.frames // 2, work.height // PIXELS.patch, work.width // PIXELS.patch)
    vision = grid[0] * grid[1] * grid[2] // 4
    return GroupSizes(
        prompt=TEXT_TOKENS + vision,
        response=work.answer_tokens,
        answers=work.answers,
        grid=grid,
        pixels=PIXELS,
    )


def update_parts(
    cell: Cell, work: Work, arch: Architecture, gpu: Gpu, mfu: float
) -> dict[str, float]:
    """Seconds of an update by what is waited for; every rank on a core or GPU of its own."""
    layout, sizes = cell.layout, sizes_of(work)
    cfg = RunConfig(
        run=Run.model_validate({"out_dir": "none"}),
        model=model_of(work),
        parallel=layout.parallel(),
    )
    machine = Machine(gpu=gpu, gpus=layout.ranks, mfu=mfu)
    batch = PackedBatch(group=sizes, groups=1, rows=sizes.rows)
    passes = training_pass(cfg, arch, batch, micro_batches(cell), machine, backward=True)
    sharers = layout.data * layout.context
    ends = [
        optimizer_phase(cfg, count_stage(arch, cfg.model, cfg.parallel, stage), sharers, machine)
        for stage in range(layout.pipeline)
    ]
    return _sum(passes, max(ends, key=lambda phase: phase.seconds))


def _sum(*phases: Phase) -> dict[str, float]:
    names = dict.fromkeys(name for phase in phases for name in phase.parts)
    return {name: sum(phase.parts.get(name, 0.0) for phase in phases) for name in names}


def fitted_mfu(cell: Cell, work: Work, arch: Architecture, gpu: Gpu, seconds: float) -> float:
    """Return the MFU at which the planner gives `seconds` to a one-rank cell; at most 1."""
    parts = update_parts(cell, work, arch, gpu, mfu=1.0)
    compute = parts["compute"]
    rest = sum(parts.values()) - compute
    return min(1.0, compute / max(seconds - rest, compute))


def predicted(parts: dict[str, float], ranks: int, units: int) -> dict[str, Any]:
    """Return seconds on `units` cores or GPUs, and the fractions of messages and idle stages."""
    alone = sum(parts.values())
    busy = alone - parts.get(IDLE, 0.0)
    seconds = max(alone, busy * ranks / units)
    messages = sum(parts.get(link, 0.0) for link in ("NVLink", "network"))
    return {
        "seconds": seconds,
        "communication": messages / busy if ranks > units else messages / alone,
        "idle": 0.0 if seconds > alone else parts.get(IDLE, 0.0) / alone,
        "parts": parts,
    }
