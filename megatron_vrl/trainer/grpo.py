"""GRPO: sync weights, generate, score, drop zero-variance groups, log rollouts, update, report.

`run_steps` is the loop of synchronous training, of overlapped training and of --rollouts-only. They
differ by `lookahead`, the number of later steps whose prompts are submitted together with those of
the current step:

    lookahead=0    every answer of a step is sampled with the weights that the step begins with
    lookahead=k    answers may be up to k updates old, and weights may change while an answer is
                   generated; each token keeps the log-prob of the weights that sampled it, so the
                   importance weights of the loss are right

With lookahead, a slow answer does not delay the step: another answered prompt takes its place until
the slow one would exceed rollout.max_staleness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vrl.context import RunContext
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.policy.policy import Update
from megatron_vrl.process.signals import begin_steps
from megatron_vrl.trainer.dataloader import PromptDataLoader
from megatron_vrl.trainer.experience import RolloutBatch, collect_rollouts
from megatron_vrl.trainer.metrics import step_metrics
from megatron_vrl.trainer.record import evaluate_dev, record
from megatron_vrl.trainer.reselect import DataSelection
from megatron_vrl.trainer.rollout_files import RolloutFiles
from megatron_vrl.trainer.rollout_queue import RolloutQueue
from megatron_vrl.trainer.sample_stream import training_pool, training_stream
from megatron_vrl.trainer.sample_viewer import log_samples
from megatron_vrl.trainer.state import RunState, save_if_due
from megatron_vrl.trainer.update import UpdateResult, update_policy
from megatron_vrl.types import Sample

# Called after each step, with its rollouts, its update and the version of the weights before it.
StepEnd = Callable[[RolloutBatch, UpdateResult | None, int], None]


def train_grpo(ctx: RunContext, state: RunState, sinks: Sinks, dev: list[Sample]) -> None:
    """Run GRPO from `state.step` to its end. Every rank calls it."""
    cfg = ctx.cfg
    if state.step == 0:  # otherwise `load_stage` has loaded reference and optimizer
        if cfg.algorithm.kl > 0:
            ctx.policy.keep_reference()
        ctx.policy.start_phase(cfg.grpo.optimizer, cfg.grpo.steps)
    loop = open_loop(ctx, state, sinks)
    if state.evaluating == "dev":
        evaluate_dev(ctx, state, sinks, dev, during="grpo")

    def end_step(rollouts: RolloutBatch, update: UpdateResult | None, version: int) -> None:
        assert update is not None
        _report_step(ctx, state, sinks, loop, rollouts, update, version)
        if cfg.grpo.evaluate_every and state.step % cfg.grpo.evaluate_every == 0:
            evaluate_dev(ctx, state, sinks, dev, during="grpo")
        save_if_due(ctx, state)

    run_steps(ctx, state, loop, cfg.rollout.max_staleness, end_step)


@dataclass(frozen=True, slots=True)
class LoopState:
    """Objects of the loop that live from step to step, beside the policy."""

    dataloader: PromptDataLoader
    rollout_queue: RolloutQueue
    files: RolloutFiles
    selection: DataSelection


def open_loop(ctx: RunContext, state: RunState, sinks: Sinks) -> LoopState:
    """Open the data and the rollout files at the step where the run stands."""
    pool = training_pool(ctx)
    stream = training_stream(ctx, pool)
    stream.restore(state.stream)
    dataloader = PromptDataLoader(ctx, stream, state, sinks.log)
    sinks.begin("grpo", ctx.cfg.grpo.steps, state.step)
    begin_steps()
    return LoopState(
        dataloader,
        RolloutQueue(ctx, state, dataloader),
        RolloutFiles(ctx, state.step),
        DataSelection(ctx, state, pool, stream, sinks.log),
    )


def run_steps(
    ctx: RunContext,
    state: RunState,
    loop: LoopState,
    lookahead: int,
    end_step: StepEnd,
    trains: bool = True,
) -> None:
    """Make the steps that are left. Without `trains` the weights stay as they are."""
    cfg, clock = ctx.cfg, ctx.clock
    while state.step < cfg.grpo.steps:
        left = cfg.grpo.steps - state.step
        with ctx.profiler("grpo", state.step + 1):
            with clock("sync"):
                ctx.rollout_manager.sync_weights(state.version)
            loop.selection.make_if_due()
            loop.rollout_queue.submit(min(1 + lookahead, left) * cfg.rollout.prompts_per_step)
            rollouts = collect_rollouts(ctx, loop.rollout_queue)
            loop.files.write(rollouts, state.step + 1, state.version)
            if lookahead == 0 and left > 1:
                loop.dataloader.prefetch(cfg.rollout.prompts_per_step)
            update = None
            if trains:
                with clock("update"):
                    update = update_policy(ctx, rollouts, state.step)
        version = state.version
        state.step += 1
        state.stream, state.in_flight = loop.dataloader.position, loop.rollout_queue.positions()
        state.version += trains
        end_step(rollouts, update, version)


def _report_step(
    ctx: RunContext,
    state: RunState,
    sinks: Sinks,
    loop: LoopState,
    rollouts: RolloutBatch,
    update: UpdateResult,
    version: int,
) -> None:
    """Write the metrics, warnings and samples of a finished step."""
    spent = ctx.clock.take()
    state.add_seconds(spent)
    values = step_metrics(ctx, rollouts, update, spent, version) | loop.dataloader.metrics()
    warn(sinks, state.step, rollouts, update.updates)
    if not update.updates and values.get("rollout/zero_variance_groups") == 1:
        formatted = values.get("reward/format")
        rest = "" if formatted is None else f"; {100 * formatted:.0f} % had the right format"
        sinks.log_once(
            "no update",
            f"Step {state.step}: there was no update, since in every group all answers earned the "
            f"same reward ({values['reward/mean']:.3f} on average{rest}). Later steps without an "
            "update are only counted by the metric actor/skipped_updates.",
        )
    record(ctx, sinks, StepMetrics(phase="grpo", step=state.step, values=values, seconds=spent))
    log_samples(ctx, sinks, rollouts.experiences[: ctx.cfg.observe.samples_per_step], state.step)


def warn(sinks: Sinks, step: int, rollouts: RolloutBatch, updates: Sequence[Update]) -> None:
    """Log the samples that were left out of a step, and the updates that were not applied."""
    if rollouts.invalid:
        sinks.log(
            f"Step {step}: left out {', '.join(rollouts.invalid)}, with a reward that is not a "
            "number: look at its reward function."
        )
    for name, failed in rollouts.failures.items():
        sinks.log(
            f"Step {step}: the reward function {name!r} failed on {len(failed)} answers, whose "
            f"groups are left out; it {failed[0]}."
        )
    for update in updates:
        if not update.applied:
            sinks.log(
                f"Step {step}: an update was left out, since a gradient was not finite; it came "
                f"from {', '.join(update.suspects)}."
            )
