"""Rollouts without training: the prompts of GRPO's steps, answered by the checkpoint, scored, kept.

Prompts, seeds and files are those of a training run with this config, so one with
rollout.engine=stored can train on them. The weights never change: their version is 0 throughout.
The same command goes on after the last step that every rank has written.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from megatron_vrl.config import RunConfig
from megatron_vrl.context import Parts, build
from megatron_vrl.errors import ConfigError, UserError
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks, open_sinks
from megatron_vrl.parallel.mesh import agreed
from megatron_vrl.process.run_lock import Owner
from megatron_vrl.storage.files import write_file
from megatron_vrl.trainer.dry_run import check
from megatron_vrl.trainer.experience import collect
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
    parts = build(cfg)
    owner.join()
    progress = out_dir / PROGRESS
    with agreed(parts.mesh):
        begun = progress.exists()
        state = RunState(**json.loads(progress.read_text())) if begun else RunState(stage="grpo")
    with agreed(parts.mesh):
        sinks = open_sinks(
            out_dir,
            cfg.observe,
            cfg.model_dump(mode="json"),
            out_dir.name,
            rank=parts.mesh.rank,
            resume=state.next_row,
        )
    failure: UserError | None = None
    try:
        _steps(parts, state, sinks, progress)
    except UserError as error:
        failure = error
    with agreed(parts.mesh):
        sinks.close()
        owner.release()
    if failure is not None:
        raise failure
    return progress.parent


def _check(cfg: RunConfig) -> None:
    if cfg.rollout.engine == "stored" or not cfg.rollout.save:
        raise ConfigError(
            f"--rollouts-only makes rollouts and writes them, with rollout.engine="
            f"{cfg.rollout.engine} and rollout.save={cfg.rollout.save} it cannot: set "
            "rollout.engine=colocated (or workers) and rollout.save=true."
        )
    if cfg.selection.every_epochs:
        raise ConfigError(
            f"selection.every_epochs={cfg.selection.every_epochs} selects by weights that "
            "--rollouts-only does not train: set 0."
        )
    check_run_dir(cfg, trains=False)
    check(cfg, int(os.environ.get("WORLD_SIZE", "1")), here=True)
    check_writable(cfg.run.out_dir, keep=True)


def _steps(parts: Parts, state: RunState, sinks: Sinks, progress: Path) -> None:
    cfg, clock = parts.cfg, parts.clock
    if cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "reward":
        parts.policy.keep_reference()
    going = begin_data(parts, state, sinks)
    with clock("sync"):
        parts.rollouts.hand_over(state.version)
    while state.step < cfg.grpo.steps:
        steps = min(1 + cfg.rollout.max_staleness, cfg.grpo.steps - state.step)
        going.flights.fill(steps * cfg.rollout.prompts_per_step)
        collected = collect(parts, going.flights)
        going.files.write(collected, state.step + 1, state.version)
        state.step += 1
        state.stream, state.under_way = going.draws.position, going.flights.positions()
        warn(sinks, state.step, collected, updates=[])
        values = answer_numbers(parts, collected.experiences, state.version)
        values |= {"rollout_rounds": float(collected.rounds)} | going.draws.numbers()
        row = StepMetrics(phase="grpo", step=state.step, values=values, seconds=clock.take())
        record(parts, sinks, row)
        with agreed(parts.mesh):  # every rank has written the step
            if parts.mesh.rank == 0:
                write_file(progress, json.dumps(asdict(state)))
        if state.step < cfg.grpo.steps:
            stop_if_asked(parts.mesh, state.step)
