"""Rollouts without training (--rollouts-only): generate, score and store the prompts of GRPO.

Prompts, seeds and files are those of a training run with the same configuration. A run with
rollout.placement=replay can train on the files. The weights stay those of model.checkpoint, and
their version is 0 at every step.

After each step that every rank has written, rank 0 writes the run's state to OUT/rollouts/
progress.json. The same command resumes after that step.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from megatron_vrl.config import RunConfig
from megatron_vrl.context import CheckedRun, RunContext, build, build_policy
from megatron_vrl.errors import ConfigError
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.process.run_lock import Owner
from megatron_vrl.storage.files import write_file
from megatron_vrl.trainer.dry_run import check
from megatron_vrl.trainer.experience import RolloutBatch
from megatron_vrl.trainer.grpo import open_loop, run_steps, warn
from megatron_vrl.trainer.metrics import answer_metrics
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.trainer.record import record
from megatron_vrl.trainer.run_dir import PROGRESS, check_run_dir, check_writable
from megatron_vrl.trainer.run_scope import run_scope
from megatron_vrl.trainer.state import RunState
from megatron_vrl.trainer.update import UpdateResult


def run_rollouts(cfg: RunConfig) -> Path:
    """Generate the rollouts of the steps that are left, and return their folder.

    Every rank calls it.
    """
    out_dir = Path(cfg.run.out_dir)
    checked = _check(cfg)
    owner = Owner(out_dir, int(os.environ.get("RANK", "0")), cfg.run.lock_timeout_s)
    trained = build_policy(cfg, checked)
    owner.join()
    trained.saver.load_weights(cfg.model.checkpoint)
    ctx = build(cfg, checked, trained)
    progress = out_dir / PROGRESS
    with raise_on_all_ranks(ctx.mesh):
        state = RunState(stage="grpo")
        if progress.exists():
            state = RunState.of_json(json.loads(progress.read_text()), progress)
    with run_scope(ctx, owner, state.next_row) as sinks:
        _run(ctx, state, sinks, progress)
    return progress.parent


def _check(cfg: RunConfig) -> CheckedRun:
    """Raises UserError if the rollouts cannot be generated or stored."""
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
    checked = check(cfg, int(os.environ.get("WORLD_SIZE", "1")), here=True)
    check_writable(cfg.run.out_dir, keep=True)
    return checked


def _run(ctx: RunContext, state: RunState, sinks: Sinks, progress: Path) -> None:
    """Make the steps that are left, without updates."""
    cfg = ctx.cfg
    if cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "reward":
        ctx.policy.keep_reference()
    loop = open_loop(ctx, state, sinks)

    def end_step(rollouts: RolloutBatch, update: UpdateResult | None, version: int) -> None:
        warn(sinks, state.step, rollouts, updates=[])
        values = answer_metrics(ctx, rollouts.experiences, version)
        values |= {"rollout/rounds": float(rollouts.rounds)} | loop.dataloader.metrics()
        spent = ctx.clock.take()
        record(ctx, sinks, StepMetrics(phase="grpo", step=state.step, values=values, seconds=spent))
        with raise_on_all_ranks(ctx.mesh):  # every rank has written the step
            if ctx.mesh.rank == 0:
                write_file(progress, json.dumps(asdict(state)))
        if state.step < cfg.grpo.steps:
            stop_if_asked(ctx.mesh, state.step)

    run_steps(ctx, state, loop, cfg.rollout.max_staleness, end_step, trains=False)
