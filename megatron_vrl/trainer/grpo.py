"""Reinforcement learning: take prompts, roll out, score, drop what teaches nothing, keep what was
said, pack, update, hand the weights over, report, save.

Synchronous here: a step's answers are all of the weights that it begins with. The loop in
grpo_overlapped.py shares everything but the order of things.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vrl.context import Parts
from megatron_vrl.observe.metrics import StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.policy.policy import Update
from megatron_vrl.process.signals import begin_steps
from megatron_vrl.trainer.dataloader import Draws
from megatron_vrl.trainer.experience import Collected, collect
from megatron_vrl.trainer.metrics import step_numbers
from megatron_vrl.trainer.record import evaluate_dev, record
from megatron_vrl.trainer.reselect import Reselection
from megatron_vrl.trainer.rollout_files import RolloutFiles
from megatron_vrl.trainer.rollout_queue import Flights
from megatron_vrl.trainer.sample_stream import training_pool, training_stream
from megatron_vrl.trainer.sample_viewer import write_cards
from megatron_vrl.trainer.state import RunState, keep_reference, save_if_due, start_phase
from megatron_vrl.trainer.update import Learned, learn
from megatron_vrl.types import VideoSample


def train_grpo(parts: Parts, state: RunState, sinks: Sinks, dev: list[VideoSample]) -> None:
    """Run GRPO from `state.step` to its end. Every rank calls it."""
    cfg, clock = parts.cfg, parts.clock
    going = begin(parts, state, sinks)
    while state.step < cfg.grpo.steps:
        with parts.traced("grpo", state.step + 1):
            with clock("sync"):
                parts.rollouts.hand_over(state.version)
            going.reselection.make_if_due()
            collected = collect(parts, going.flights)
            going.files.write(collected, state.step + 1, state.version)
            if state.step + 1 < cfg.grpo.steps:
                going.draws.prefetch(cfg.rollout.prompts_per_step)
            with clock("update"):
                learned = learn(parts, collected, state.step)
        end_step(parts, state, sinks, going, collected, learned, dev)


@dataclass(frozen=True, slots=True)
class Going:
    """What goes on from step to step, beside the policy."""

    draws: Draws
    flights: Flights
    files: RolloutFiles
    reselection: Reselection


def begin(parts: Parts, state: RunState, sinks: Sinks) -> Going:
    """Set the policy and the data to where the run stands."""
    cfg = parts.cfg
    if cfg.algorithm.kl > 0:
        keep_reference(parts, state)
    start_phase(parts, state, cfg.grpo.optimizer, cfg.grpo.steps)
    return begin_data(parts, state, sinks)


def begin_data(parts: Parts, state: RunState, sinks: Sinks) -> Going:
    """The data alone, for a policy that stands where it should."""
    pool = training_pool(parts)
    stream = training_stream(parts, pool)
    stream.restore(state.stream)
    draws = Draws(parts, stream, state, sinks.say)
    sinks.begin("grpo", parts.cfg.grpo.steps, state.step)
    begin_steps()
    return Going(
        draws,
        Flights(parts, state, draws),
        RolloutFiles(parts, state.step),
        Reselection(parts, state, pool, stream, sinks.say),
    )


def end_step(
    parts: Parts,
    state: RunState,
    sinks: Sinks,
    going: Going,
    collected: Collected,
    learned: Learned,
    dev: list[VideoSample],
) -> None:
    """Count the step, report it, evaluate and save where it is time."""
    cfg, version = parts.cfg, state.version
    state.step += 1
    state.stream, state.under_way = going.draws.position, going.flights.positions()
    state.version += 1
    spent = parts.clock.take()
    state.add_seconds(spent)
    values = step_numbers(parts, collected, learned, spent, version) | going.draws.numbers()
    warn(sinks, state.step, collected, learned.updates)
    if not learned.updates and values.get("uniform_groups") == 1:
        sinks.say_once(
            "no update",
            f"Step {state.step}: nothing was learned, for in every group all answers earned the "
            f"same reward ({values['reward']:.3f} on average; the form was kept by "
            f"{100 * values['format_rate']:.0f} %). Later steps without an update are counted by "
            "the metric updates_left_out alone.",
        )
    record(parts, sinks, StepMetrics(phase="grpo", step=state.step, values=values, seconds=spent))
    write_cards(parts, sinks, collected.experiences[: cfg.observe.cards_per_step], state.step)
    if cfg.grpo.evaluate_every and state.step % cfg.grpo.evaluate_every == 0:
        evaluate_dev(parts, state, sinks, dev, during="grpo")
    save_if_due(parts, state)


def warn(sinks: Sinks, step: int, collected: Collected, updates: Sequence[Update]) -> None:
    """Name the samples that a step could not be taught by."""
    if collected.invalid:
        sinks.say(
            f"Step {step}: left out {', '.join(collected.invalid)}, with a reward that is not a "
            "number: look at its reward function."
        )
    for name, failed in collected.failures.items():
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
