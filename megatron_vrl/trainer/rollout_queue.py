"""Prompts on their way: drawn, asked of the engines, and answered.

What is asked for stays under way until it is taken; a step takes what was asked longest ago or is
ready first. The seed of an answer comes from its sample's place in the stream, so neither layout
nor timing changes it, and a run that goes on from a checkpoint asks again what was under way.
"""

from dataclasses import dataclass
from itertools import chain

from megatron_vrl.config import RunConfig
from megatron_vrl.context import RunContext
from megatron_vrl.parallel.mesh import gather_objects, world_axis
from megatron_vrl.rollout.interfaces import RolloutFuture
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.trainer.dataloader import PromptDataLoader
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import Prompt, Rollout, VideoSample


def sampling_spec(cfg: RunConfig) -> SamplingSpec:
    """How a training step's answers are drawn; each prompt then has a seed of its own."""
    return SamplingSpec(
        n=cfg.rollout.group_size,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        max_tokens=cfg.rollout.max_response_tokens,
        seed=cfg.run.seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InFlightRequest:
    sample: VideoSample
    prompt: Prompt
    position: int  # of the sample in the stream
    version: int  # of the weights when it was asked
    asked: RolloutFuture


class RolloutQueue:
    """This rank's. Every rank calls its methods, in the same order."""

    def __init__(self, ctx: RunContext, state: RunState, dataloader: PromptDataLoader) -> None:
        self._ctx, self._state, self._draws = ctx, state, dataloader
        self._under_way: list[InFlightRequest] = []

    def fill(self, num: int) -> None:
        """Ask for as many as `num` prompts of all ranks lack."""
        lacking = num - len(self.positions())
        if lacking > 0:
            self._ask(lacking)

    def take(self, num: int) -> list[tuple[VideoSample, Prompt, list[Rollout]]]:
        """This rank's share of `num` answered prompts. Asks for what is not under way.

        Those that would be staler than rollout.max_staleness at the next step come first.
        """
        self.fill(num)
        ctx, rollout_queue = self._ctx, self._under_way
        oldest = self._state.version - ctx.cfg.rollout.max_staleness
        due = [flight for flight in rollout_queue if flight.version <= oldest]
        ordered = due + [flight for flight in rollout_queue if flight.version > oldest]
        share = min(len(ctx.rank_share(range(num))), len(ordered))
        with ctx.clock("rollout"):
            asked = [flight.asked for flight in ordered]
            chosen = ctx.rollout_manager.wait(asked, required=min(len(due), share), count=share)
            taken = [ordered[index] for index in sorted(chosen)]
            answers = ctx.rollout_manager.results([flight.asked for flight in taken])
        self._under_way = [flight for flight in rollout_queue if flight not in taken]
        return [(f.sample, f.prompt, a) for f, a in zip(taken, answers, strict=True)]

    def positions(self) -> list[int]:
        """Places in the stream of all ranks' samples that are under way."""
        own = [flight.position for flight in self._under_way]
        return sorted(chain(*gather_objects(world_axis(self._ctx.mesh), own)))

    def _ask(self, num: int) -> None:
        ctx = self._ctx
        with ctx.clock("encode"):
            drawn = self._draws.take(num)
            prompts = ctx.look([made.prompt for made in drawn])
        with ctx.clock("rollout"):
            positions = [made.position for made in drawn]
            asked = ctx.rollout_manager.submit(prompts, sampling_spec(ctx.cfg), positions)
        self._under_way += [
            InFlightRequest(
                sample=made.sample,
                prompt=prompt,
                position=made.position,
                version=self._state.version,
                asked=one,
            )
            for made, prompt, one in zip(drawn, prompts, asked, strict=True)
        ]
