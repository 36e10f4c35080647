"""The same loop with the next steps' answers under way while this one trains.

Answers may be of weights up to `rollout.max_staleness` updates old, and change weights on the way;
each token keeps the log-prob of the weights that gave it, so the importance weights of the loss are
right. A slow answer does not hold the step: another that is ready takes its place, until its
weights are too old to wait any longer.
"""

from megatron_vrl.context import Parts
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.trainer.experience import collect
from megatron_vrl.trainer.grpo import begin, end_step
from megatron_vrl.trainer.state import RunState
from megatron_vrl.trainer.update import learn
from megatron_vrl.types import VideoSample


def train_overlapped(parts: Parts, state: RunState, sinks: Sinks, dev: list[VideoSample]) -> None:
    """Run GRPO from `state.step` to its end. Every rank calls it."""
    cfg, clock = parts.cfg, parts.clock
    going = begin(parts, state, sinks)
    while state.step < cfg.grpo.steps:
        with parts.traced("grpo", state.step + 1):
            with clock("sync"):
                parts.rollouts.hand_over(state.version)
            going.reselection.make_if_due()
            steps = min(1 + cfg.rollout.max_staleness, cfg.grpo.steps - state.step)
            going.flights.fill(steps * cfg.rollout.prompts_per_step)
            collected = collect(parts, going.flights)
            going.files.write(collected, state.step + 1, state.version)
            with clock("update"):
                learned = learn(parts, collected, state.step)
        end_step(parts, state, sinks, going, collected, learned, dev)
