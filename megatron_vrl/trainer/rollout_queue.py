"""Queue of rollout requests between the data loader and the engines.

States of a prompt:

    drawn -> IN FLIGHT -> ANSWERED -> collected

`submit` draws prompts from the data loader and sends them to the engines. A prompt is in flight
until `collect` returns it, also when its answers are ready. `collect` first takes the requests that
would be staler than rollout.max_staleness at the next step, oldest first, and then the ones that
are answered first.

Example with 2 prompts per step and max_staleness 1. Step 1 submits prompts 0 to 3 at version 0,
collects 0 and 2, which are answered first, and trains. Step 2, at version 1, submits 4 and 5. It
must collect 1 and 3, since at version 2 they would be 2 versions old.

With `rewards.temporal: shuffled_group` a request has a second prompt, the first with its frames
shuffled, and half as many answers to it. The two are answered together.

The seed of an answer comes from the position of its sample in the stream. Layout and timing do not
change it. A resumed run submits again what was in flight when its checkpoint was written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from megatron_vrl.config import RunConfig
from megatron_vrl.context import RunContext
from megatron_vrl.data.shuffled_frames import all_shuffled
from megatron_vrl.parallel.mesh import gather_objects, shard, world_axis
from megatron_vrl.rollout.interfaces import RolloutFuture
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.trainer.dataloader import PreparedSample, PromptDataLoader
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import Prompt, Rollout, Sample

SHUFFLED_SEED = 1 << 32  # added to run.seed for answers to shuffled frames


def sampling_spec(cfg: RunConfig) -> SamplingSpec:
    """Return how the answers of a training step are sampled. Each prompt gets its own seed."""
    return SamplingSpec(
        n=cfg.rollout.group_size,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        max_tokens=cfg.rollout.max_response_tokens,
        seed=cfg.run.seed,
    )


class AnsweredPrompt(NamedTuple):
    sample: Sample
    prompt: Prompt
    rollouts: list[Rollout]
    shuffled: list[Rollout]  # answers to the prompt with shuffled frames; [] if not asked for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InFlightRequest:
    sample: Sample
    prompt: Prompt
    position: int  # of the sample in the stream
    version: int  # of the weights when the request was submitted
    futures: tuple[RolloutFuture, ...]  # of the prompt, and of the prompt with shuffled frames

    def done(self) -> bool:
        """Return whether all answers are there."""
        return all(future.done() for future in self.futures)

    def result(self) -> list[Rollout]:
        """Return all answers, those to shuffled frames last. Raises RolloutError."""
        return [rollout for future in self.futures for rollout in future.result()]

    def answered(self, rollouts: list[Rollout]) -> AnsweredPrompt:
        """Return the request with its answers, which `result` has returned."""
        n = len(self.futures[0].result())
        return AnsweredPrompt(self.sample, self.prompt, rollouts[:n], rollouts[n:])


class RolloutQueue:
    """Queue of this rank's requests. Every rank calls its methods, in the same order."""

    def __init__(self, ctx: RunContext, state: RunState, dataloader: PromptDataLoader) -> None:
        self._ctx, self._state, self._dataloader = ctx, state, dataloader
        self._in_flight: list[InFlightRequest] = []  # in the order of submission

    def submit(self, num: int) -> None:
        """Submit prompts until `num` prompts of all ranks are in flight."""
        lacking = num - len(self.positions())
        if lacking > 0:
            self._submit_new(lacking)

    def collect(self, num: int) -> list[AnsweredPrompt]:
        """Return this rank's shard of `num` answered prompts, after submitting what is missing."""
        self.submit(num)
        ctx, mesh = self._ctx, self._ctx.mesh
        oldest = self._state.version - ctx.cfg.rollout.max_staleness
        due = [request for request in self._in_flight if request.version <= oldest]
        ordered = due + [request for request in self._in_flight if request.version > oldest]
        count = min(len(shard(range(num), mesh.data, mesh.model)), len(ordered))
        with ctx.clock("rollout"):
            chosen = ctx.rollout_manager.wait(ordered, required=min(len(due), count), count=count)
            taken = [ordered[index] for index in sorted(chosen)]
            answers = ctx.rollout_manager.results(taken)
        self._in_flight = [request for request in self._in_flight if request not in taken]
        return [request.answered(of_it) for request, of_it in zip(taken, answers, strict=True)]

    def positions(self) -> list[int]:
        """Return the stream positions of all ranks' samples that are in flight, ascending."""
        own = [request.position for request in self._in_flight]
        return sorted(chain(*gather_objects(world_axis(self._ctx.mesh), own)))

    def _submit_new(self, num: int) -> None:
        """Draw `num` samples over all ranks and send this rank's shard to the engines."""
        ctx = self._ctx
        with ctx.clock("encode"):
            drawn = self._dataloader.take(num)
            prompts = ctx.embed([*(one.prompt for one in drawn), *self._shuffled(drawn)])
        with ctx.clock("rollout"):
            specs = _specs(ctx.cfg, [prepared.position for prepared in drawn])
            futures = ctx.rollout_manager.submit_each(prompts, specs[: len(prompts)])
        self._in_flight += [
            InFlightRequest(
                sample=prepared.sample,
                prompt=prompts[index],
                position=prepared.position,
                version=self._state.version,
                futures=tuple(futures[index :: len(drawn)]),
            )
            for index, prepared in enumerate(drawn)
        ]

    def _shuffled(self, drawn: Sequence[PreparedSample]) -> list[Prompt]:
        """Return the prompts with shuffled frames, if `rewards.temporal` asks for them."""
        cfg = self._ctx.cfg
        if cfg.rewards.temporal != "shuffled_group":
            return []
        return [all_shuffled(one.prompt, (cfg.run.seed, one.position)) for one in drawn]


def _specs(cfg: RunConfig, positions: Sequence[int]) -> list[SamplingSpec]:
    """Return the specs of prompts at these positions, then those of their shuffled prompts."""
    spec = sampling_spec(cfg)
    shuffled = replace(spec, n=max(1, spec.n // 2), seed=spec.seed + SHUFFLED_SEED)
    return [one.for_prompt(position) for one in (spec, shuffled) for position in positions]
