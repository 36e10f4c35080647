"""The same loop with the next steps' answers under way while this one trains.

Answers may be of weights up to `rollout.max_staleness` updates old, and change weights on the way;
each token keeps the log-prob of the weights that gave it, so the importance weights of the loss are
right. A slow answer does not hold the step: another that is ready takes its place, until its
weights are too old to wait any longer.
"""

from megatron_vrl.context import RunContext
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.trainer.experience import collect_rollouts
from megatron_vrl.trainer.grpo import begin, end_step
from megatron_vrl.trainer.state import RunState
from megatron_vrl.trainer.update import update_policy
from megatron_vrl.types import VideoSample


def train_overlapped(
    ctx: RunContext, state: RunState, sinks: Sinks, dev: list[VideoSample]
) -> None:
    """Run GRPO from `state.step` to its end. Every rank calls it."""
    cfg, clock = ctx.cfg, ctx.clock
    going = begin(ctx, state, sinks)
    while state.step < cfg.grpo.steps:
        with ctx.profiler("grpo", state.step + 1):
            with clock("sync"):
                ctx.rollout_manager.sync_weights(state.version)
            going.reselection.make_if_due()
            steps = min(1 + cfg.rollout.max_staleness, cfg.grpo.steps - state.step)
            going.rollout_queue.submit(steps * cfg.rollout.prompts_per_step)
            rollout_batch = collect_rollouts(ctx, going.rollout_queue)
            going.files.write(rollout_batch, state.step + 1, state.version)
            with clock("update"):
                update_result = update_policy(ctx, rollout_batch, state.step)
        end_step(ctx, state, sinks, going, rollout_batch, update_result, dev)
