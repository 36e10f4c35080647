"""Supervised fine-tuning (SFT) before GRPO: cross-entropy of the target answers.

SFT uses the data loader, the packing and the model of GRPO. With sft.stop_at it is a short warm-up:
it ends when sft.stop_metric reaches sft.stop_at in an evaluation of the split `dev`. If that does
not happen within sft.steps, SFT starts over from model.checkpoint with the next seed, at most
sft.restarts times. Without sft.stop_at SFT makes all its steps. With sft.load_best_at_end it ends
with the weights of its best evaluation, which a checkpoint holds.
"""

import numpy as np

from megatron_vrl.algorithms.sft import token_loss
from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.context import RunContext
from megatron_vrl.errors import ConfigError, UserError, counted
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.parallel.mesh import gather_shards
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.process.signals import begin_steps
from megatron_vrl.trainer.dataloader import PromptDataLoader
from megatron_vrl.trainer.record import evaluate_dev, record
from megatron_vrl.trainer.sample_stream import open_run_pool, weighted
from megatron_vrl.trainer.state import (
    RunState,
    checkpoint_name,
    finish_saving,
    save,
    save_if_due,
)
from megatron_vrl.types import Sample


def train_sft(ctx: RunContext, state: RunState, sinks: Sinks, dev: list[Sample]) -> None:
    """Run SFT to its end. Every rank calls the function.

    Raises UserError if no attempt reaches sft.stop_at.
    """
    cfg = ctx.cfg.sft
    while not _train_attempt(ctx, state, sinks, dev):
        if state.attempt == cfg.restarts:
            raise UserError(
                f"SFT did not bring {cfg.stop_metric} to {cfg.stop_at} within {cfg.steps} steps in "
                f"{counted(state.attempt + 1, 'attempt')}: set another run.seed or more sft.steps."
            )
        state.attempt += 1
        state.best_step, state.best_value = 0, 0.0
        state.begin("sft")
        ctx.saver.load_weights(ctx.cfg.model.checkpoint)
        sinks.log(
            f"SFT did not reach {cfg.stop_metric} {cfg.stop_at} in {cfg.steps} steps; "
            f"starting over with seed {ctx.cfg.run.seed + state.attempt}."
        )
    if state.best_step not in (0, state.step):
        _load_best(ctx, state, sinks)


def _train_attempt(ctx: RunContext, state: RunState, sinks: Sinks, dev: list[Sample]) -> bool:
    """Train from `state.step` on; return False if no evaluation reaches sft.stop_at."""
    cfg, clock = ctx.cfg, ctx.clock
    seed = cfg.run.seed + state.attempt
    stream = weighted(open_run_pool(ctx, cfg.data.sft), cfg.data.sft, seed)
    stream.restore(state.stream)
    dataloader = PromptDataLoader(ctx, stream, state, sinks.log)
    if state.step == 0:  # otherwise `load_stage` has loaded the optimizer
        ctx.policy.start_phase(cfg.sft.optimizer, cfg.sft.steps)
    sinks.begin("sft", cfg.sft.steps, state.step)
    begin_steps()
    if state.evaluating == "dev" and _reaches_threshold(ctx, state, sinks, dev):
        return True
    while state.step < cfg.sft.steps:
        with ctx.profiler("sft", state.step + 1):
            with clock("encode"):
                own = [
                    Group(prompt=prompt, answers=(_target(ctx, sample),))
                    for sample, prompt, _ in dataloader.take(cfg.sft.batch_size)
                ]
                groups = gather_shards(own, ctx.mesh.model)
            if state.step + 1 < cfg.sft.steps:
                dataloader.prefetch(cfg.sft.batch_size)
            with clock("update"):
                batches = plan_batches(groups, groups[0], cfg.batch, ctx.mesh)
                update = ctx.policy.update(batches, token_loss, Distribution(), state.step)
        state.step += 1
        state.stream = stream.state
        state.version += 1
        values = {
            "sft/loss": update.loss,
            "sft/grad_norm": update.grad_norm,
            "sft/lr": update.lr,
        }
        values |= {k: v for k, v in update.metrics.items() if k.startswith("fp8/")}
        values |= dataloader.metrics()
        spent = clock.take()
        state.add_seconds(spent)
        row = StepMetrics(phase="sft", step=state.step, values=values, seconds=spent)
        record(ctx, sinks, row)
        is_due = cfg.sft.stop_metric and state.step % cfg.sft.evaluate_every == 0
        if is_due and _reaches_threshold(ctx, state, sinks, dev):
            return True
        save_if_due(ctx, state)
    return not cfg.sft.stop_metric or cfg.sft.stop_at is None


def _target(ctx: RunContext, sample: Sample) -> Answer:
    """Return the SFT target of a sample."""
    token_ids = ctx.encoder.target(sample)
    return Answer(
        token_ids=token_ids,
        advantage=0.0,
        engine_logprobs=np.zeros(len(token_ids), dtype=np.float32),
    )


def _reaches_threshold(ctx: RunContext, state: RunState, sinks: Sinks, dev: list[Sample]) -> bool:
    """Evaluate on `dev` and return whether sft.stop_metric has reached sft.stop_at.

    With sft.load_best_at_end, weights that are the best so far are saved.
    """
    cfg = ctx.cfg.sft
    metrics = evaluate_dev(ctx, state, sinks, dev, during="sft")
    if cfg.stop_metric not in metrics:
        raise ConfigError(
            f"sft.stop_metric={cfg.stop_metric!r} is not measured on dev; "
            f"choose one of {', '.join(sorted(metrics))}."
        )
    value = metrics[cfg.stop_metric]
    if cfg.load_best_at_end and (not state.best_step or value > state.best_value):
        state.best_step, state.best_value = state.step, value
        save(ctx, state)
    if cfg.stop_at is None or value < cfg.stop_at:
        return False
    sinks.log(
        f"SFT ends at step {state.step}: {cfg.stop_metric} on dev is {value:.3f}, and sft.stop_at "
        f"is {cfg.stop_at}."
    )
    return True


def _load_best(ctx: RunContext, state: RunState, sinks: Sinks) -> None:
    """Load the weights of the best evaluation. They get a version of their own."""
    finish_saving(ctx)
    ctx.saver.load_weights(ctx.saver.root / checkpoint_name("sft", state.attempt, state.best_step))
    state.version += 1
    sinks.log(
        f"SFT ends with the weights of step {state.best_step} of {state.step}: "
        f"{ctx.cfg.sft.stop_metric} on dev was {state.best_value:.3f}."
    )
