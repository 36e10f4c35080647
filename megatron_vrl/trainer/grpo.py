"""Reinforcement learning: take prompts, roll out, score, drop what teaches nothing, keep what was
said, pack, update, hand the weights over, report, save.

Synchronous here: a step's answers are all of the weights that it begins with. The loop in
grpo_overlapped.py shares everything but the order of things.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vrl.context import RunContext
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.policy.policy import Update
from megatron_vrl.process.signals import begin_steps
from megatron_vrl.trainer.dataloader import PromptDataLoader
from megatron_vrl.trainer.experience import RolloutBatch, collect_rollouts
from megatron_vrl.trainer.metrics import step_numbers
from megatron_vrl.trainer.record import evaluate_dev, record
from megatron_vrl.trainer.reselect import DataSelection
from megatron_vrl.trainer.rollout_files import RolloutFiles
from megatron_vrl.trainer.rollout_queue import RolloutQueue
from megatron_vrl.trainer.sample_stream import training_pool, training_stream
from megatron_vrl.trainer.sample_viewer import write_cards
from megatron_vrl.trainer.state import RunState, keep_reference, save_if_due, start_phase
from megatron_vrl.trainer.update import UpdateResult, update_policy
from megatron_vrl.types import VideoSample


def train_grpo(ctx: RunContext, state: RunState, sinks: Sinks, dev: list[VideoSample]) -> None:
    """Run GRPO from `state.step` to its end. Every rank calls it."""
    cfg, clock = ctx.cfg, ctx.clock
    going = begin(ctx, state, sinks)
    while state.step < cfg.grpo.steps:
        with ctx.profiler("grpo", state.step + 1):
            with clock("sync"):
                ctx.rollout_manager.sync_weights(state.version)
            going.reselection.make_if_due()
            rollout_batch = collect_rollouts(ctx, going.rollout_queue)
            going.files.write(rollout_batch, state.step + 1, state.version)
            if state.step + 1 < cfg.grpo.steps:
                going.dataloader.prefetch(cfg.rollout.prompts_per_step)
            with clock("update"):
                update_result = update_policy(ctx, rollout_batch, state.step)
        end_step(ctx, state, sinks, going, rollout_batch, update_result, dev)


@dataclass(frozen=True, slots=True)
class LoopState:
    """What goes on from step to step, beside the policy."""

    dataloader: PromptDataLoader
    rollout_queue: RolloutQueue
    files: RolloutFiles
    reselection: DataSelection


def begin(ctx: RunContext, state: RunState, sinks: Sinks) -> LoopState:
    """Set the policy and the data to where the run stands."""
    cfg = ctx.cfg
    if cfg.algorithm.kl > 0:
        keep_reference(ctx, state)
    start_phase(ctx, state, cfg.grpo.optimizer, cfg.grpo.steps)
    return begin_data(ctx, state, sinks)


def begin_data(ctx: RunContext, state: RunState, sinks: Sinks) -> LoopState:
    """The data alone, for a policy that stands where it should."""
    pool = training_pool(ctx)
    stream = training_stream(ctx, pool)
    stream.restore(state.stream)
    dataloader = PromptDataLoader(ctx, stream, state, sinks.say)
    sinks.begin("grpo", ctx.cfg.grpo.steps, state.step)
    begin_steps()
    return LoopState(
        dataloader,
        RolloutQueue(ctx, state, dataloader),
        RolloutFiles(ctx, state.step),
        DataSelection(ctx, state, pool, stream, sinks.say),
    )


def end_step(
    ctx: RunContext,
    state: RunState,
    sinks: Sinks,
    going: LoopState,
    rollout_batch: RolloutBatch,
    update_result: UpdateResult,
    dev: list[VideoSample],
) -> None:
    """Count the step, report it, evaluate and save where it is time."""
    cfg, version = ctx.cfg, state.version
    state.step += 1
    state.stream, state.under_way = going.dataloader.position, going.rollout_queue.positions()
    state.version += 1
    spent = ctx.clock.take()
    state.add_seconds(spent)
    values = (
        step_numbers(ctx, rollout_batch, update_result, spent, version) | going.dataloader.metrics()
    )
    warn(sinks, state.step, rollout_batch, update_result.updates)
    if not update_result.updates and values.get("zero_variance_groups") == 1:
        sinks.say_once(
            "no update",
            f"Step {state.step}: nothing was learned, for in every group all answers earned the "
            f"same reward ({values['reward']:.3f} on average; the form was kept by "
            f"{100 * values['format_rate']:.0f} %). Later steps without an update are counted by "
            "the metric updates_left_out alone.",
        )
    record(ctx, sinks, StepMetrics(phase="grpo", step=state.step, values=values, seconds=spent))
    write_cards(ctx, sinks, rollout_batch.experiences[: cfg.observe.samples_per_step], state.step)
    if cfg.grpo.evaluate_every and state.step % cfg.grpo.evaluate_every == 0:
        evaluate_dev(ctx, state, sinks, dev, during="grpo")
    save_if_due(ctx, state)


def warn(sinks: Sinks, step: int, rollout_batch: RolloutBatch, updates: Sequence[Update]) -> None:
    """Name the samples that a step could not be taught by."""
    if rollout_batch.invalid:
        sinks.say(
            f"Step {step}: left out {', '.join(rollout_batch.invalid)}, with a reward that is "
            "not a number: look at its reward function."
        )
    for name, failed in rollout_batch.failures.items():
        sinks.say(
            f"Step {step}: the reward function {name!r} failed on {len(failed)} answers, whose "
            f"groups are left out; it {failed[0]}."
        )
    for update in updates:
        if not update.applied:
            sinks.say(
                f"Step {step}: an update was left out, since a gradient was not finite; it came "
                f"from {', '.join(update.suspects)}."
            )
