"""Rollouts without training: the prompts of GRPO's steps, answered by the checkpoint, scored, kept.

Prompts, seeds and files are those of a training run with this config, so one with
rollout.placement=replay can train on them. The weights never change: their version is 0 throughout.
The same command goes on after the last step that every rank has written.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from megatron_vrl.config import RunConfig
from megatron_vrl.context import RunContext, build
from megatron_vrl.errors import ConfigError, UserError
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks, open_sinks
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.process.run_lock import Owner
from megatron_vrl.storage.files import write_file
from megatron_vrl.trainer.dry_run import check
from megatron_vrl.trainer.experience import collect_rollouts
from megatron_vrl.trainer.grpo import begin_data, warn
from megatron_vrl.trainer.metrics import answer_numbers
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.trainer.record import record
from megatron_vrl.trainer.run_dir import PROGRESS, check_run_dir, check_writable
from megatron_vrl.trainer.state import RunState


def run_rollouts(cfg: RunConfig) -> Path:
    """Make what is left of `grpo.steps` steps and return their folder. Every rank calls it."""
    out_dir = Path(cfg.run.out_dir)
    _check(cfg)
    owner = Owner(out_dir, int(os.environ.get("RANK", "0")), cfg.run.lock_timeout_s)
    ctx = build(cfg)
    owner.join()
    progress = out_dir / PROGRESS
    with raise_on_all_ranks(ctx.mesh):
        begun = progress.exists()
        state = RunState(**json.loads(progress.read_text())) if begun else RunState(stage="grpo")
    with raise_on_all_ranks(ctx.mesh):
        sinks = open_sinks(
            out_dir,
            cfg.observe,
            cfg.model_dump(mode="json"),
            out_dir.name,
            rank=ctx.mesh.rank,
            resume=state.next_row,
        )
    failure: UserError | None = None
    try:
        _steps(ctx, state, sinks, progress)
    except UserError as error:
        failure = error
    with raise_on_all_ranks(ctx.mesh):
        sinks.close()
        owner.release()
    if failure is not None:
        raise failure
    return progress.parent


def _check(cfg: RunConfig) -> None:
    if cfg.rollout.placement == "replay" or not cfg.rollout.save:
        raise ConfigError(
            f"--rollouts-only makes rollouts and writes them, with rollout.placement="
            f"{cfg.rollout.placement} and rollout.save={cfg.rollout.save} it cannot: set "
            "rollout.placement=colocated (or workers) and rollout.save=true."
        )
    if cfg.selection.every_epochs:
        raise ConfigError(
            f"selection.every_epochs={cfg.selection.every_epochs} selects by weights that "
            "--rollouts-only does not train: set 0."
        )
    check_run_dir(cfg, trains=False)
    check(cfg, int(os.environ.get("WORLD_SIZE", "1")), here=True)
    check_writable(cfg.run.out_dir, keep=True)


def _steps(ctx: RunContext, state: RunState, sinks: Sinks, progress: Path) -> None:
    cfg, clock = ctx.cfg, ctx.clock
    if cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "reward":
        ctx.policy.keep_reference()
    going = begin_data(ctx, state, sinks)
    with clock("sync"):
        ctx.rollout_manager.sync_weights(state.version)
    while state.step < cfg.grpo.steps:
        steps = min(1 + cfg.rollout.max_staleness, cfg.grpo.steps - state.step)
        going.rollout_queue.submit(steps * cfg.rollout.prompts_per_step)
        rollout_batch = collect_rollouts(ctx, going.rollout_queue)
        going.files.write(rollout_batch, state.step + 1, state.version)
        state.step += 1
        state.stream, state.under_way = going.dataloader.position, going.rollout_queue.positions()
        warn(sinks, state.step, rollout_batch, updates=[])
        values = answer_numbers(ctx, rollout_batch.experiences, state.version)
        values |= {"rollout_rounds": float(rollout_batch.rounds)} | going.dataloader.metrics()
        row = StepMetrics(phase="grpo", step=state.step, values=values, seconds=clock.take())
        record(ctx, sinks, row)
        with raise_on_all_ranks(ctx.mesh):  # every rank has written the step
            if ctx.mesh.rank == 0:
                write_file(progress, json.dumps(asdict(state)))
        if state.step < cfg.grpo.steps:
            stop_if_asked(ctx.mesh, state.step)
