"""Rows of layouts that were not run: the planner's arithmetic over pieces that were measured.

An update alone, passes and optimizer; rollouts need no message between replicas. A row says of each
piece where it is from. Layouts grow along the data axis, as a run that gets more GPUs does. Not
simulated: stragglers, uneven answers, contention between jobs, a network that thins out towards
its top.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vrl.checkpoint.layout import hf_dir_of
from megatron_vrl.config import RunConfig, load_config
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.planner.hardware import Gpu
from megatron_vrl.planner.plan import PlanRequest, make_plan, refusals
from scaling.grid import Cell, Layout, Mode, Study, micro_batches
from scaling.predict import IDLE, update_parts

Row = dict[str, Any]
MODES: tuple[Mode, ...] = ("strong", "weak")


def simulated_sizes(
    study: Study, archs: Mapping[str, Architecture], gpu: Gpu, mfus: Mapping[str, float]
) -> Iterator[Row]:
    """Yield rows of the grid's sizes on this machine, data-parallel, from one-rank cells."""
    pieces = {
        "compute": "measured: matrix product and one-rank update",
        "messages": "measured: all-reduce of few ranks",
    }
    for size, mfu in mfus.items():
        for mode in MODES:
            rows = []
            for ranks in study.simulate.gpus:
                prompts = study.simulate.prompts
                if mode == "weak":
                    prompts = study.work.prompts * ranks
                if prompts < ranks:
                    rows.append(_refused(ranks, f"too few prompts for them: {prompts}."))
                    continue
                cell = Cell(mode=mode, size=size, layout=Layout(data=ranks), prompts=prompts)
                parts = update_parts(cell, study.work, archs[size], gpu, mfu)
                rows.append(_row(ranks, parts, prompts, micro_batches(cell)))
            yield from _finished(rows, mode, size, gpu, mfu, pieces)


def simulated_configs(
    study: Study, gpu: Gpu, mfu: float, pieces: Mapping[str, str]
) -> Iterator[Row]:
    """Yield rows of the ready configs on `gpu`."""
    for path in study.simulate.configs:
        cfg = load_config(path)
        checkpoint = hf_dir_of(cfg.model.checkpoint)
        known = (checkpoint / "config.json").exists() or not cfg.model.architecture
        arch = read_architecture(checkpoint if known else Path(cfg.model.architecture))
        for mode in MODES:
            rows = [_of_config(cfg, arch, mode, n, study, gpu, mfu) for n in study.simulate.gpus]
            kept = [row for row in rows if row is not None]
            yield from _finished(kept, mode, Path(path).stem, gpu, mfu, pieces)


def _of_config(
    cfg: RunConfig, arch: Architecture, mode: Mode, gpus: int, study: Study, gpu: Gpu, mfu: float
) -> Row | None:
    """Return the row, or None if `gpus` is no multiple of a replica's GPUs."""
    parallel = cfg.parallel
    replicas, odd = divmod(gpus, parallel.tensor * parallel.context * parallel.pipeline)
    if odd or not replicas:
        return None
    asked = study.simulate
    prompts = asked.prompts if mode == "strong" else asked.prompts_per_replica * replicas
    update: dict[str, Any] = {
        "rollout": cfg.rollout.model_copy(update={"prompts_per_step": prompts})
    }
    update["sft"] = cfg.sft.model_copy(update={"batch_size": max(prompts, cfg.sft.batch_size)})
    changed = cfg.model_copy(update=update)
    if broken := refusals(changed, arch, gpu, gpus):
        return _refused(gpus, broken[0])
    plan = make_plan(changed, arch, PlanRequest(gpu=gpu, gpus=gpus, mfu=mfu))
    if plan.refused:
        return _refused(gpus, plan.refused[0])
    passes, end = plan.phases["update"].parts, plan.phases["optimizer"].parts
    parts = {name: passes.get(name, 0.0) + end.get(name, 0.0) for name in {**passes, **end}}
    return _row(gpus, parts, prompts, plan.micro_batches) | {"step_s": plan.seconds}


def _refused(gpus: int, why: str) -> Row:
    return {"gpus": gpus, "refused": why}


def _row(gpus: int, parts: Mapping[str, float], prompts: int, batches: int) -> Row:
    seconds = sum(parts.values())
    return {
        "gpus": gpus,
        "prompts": prompts,
        "micro_batches": batches,
        "seconds": seconds,
        "communication": (parts.get("NVLink", 0.0) + parts.get("network", 0.0)) / seconds,
        "idle": parts.get(IDLE, 0.0) / seconds,
        "seconds_by_cause": dict(parts),
    }


def _finished(
    rows: Sequence[Row], mode: str, of: str, gpu: Gpu, mfu: float, pieces: Mapping[str, str]
) -> Iterator[Row]:
    """Add the efficiency: prompts a second and GPU, relative to the fewest GPUs that can run."""
    base = None
    for row in rows:
        about = {"simulated": True, "mode": mode, "of": of, "gpu": gpu.name, "mfu": mfu}
        about["pieces"] = dict(pieces)
        if "seconds" in row:
            speed = row["prompts"] / row["seconds"] / row["gpus"]
            base = base or speed
            row = {**row, "efficiency": speed / base}
        yield about | row
