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

The seed of an answer comes from the position of its sample in the stream. Layout and timing do not
change it. A resumed run submits again what was in flight when its checkpoint was written.
"""

from dataclasses import dataclass
from itertools import chain

from megatron_vrl.config import RunConfig
from megatron_vrl.context import RunContext
from megatron_vrl.parallel.mesh import gather_objects, shard, world_axis
from megatron_vrl.rollout.interfaces import RolloutFuture
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.trainer.dataloader import PromptDataLoader
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import Prompt, Rollout, VideoSample


def sampling_spec(cfg: RunConfig) -> SamplingSpec:
    """Return how the answers of a training step are sampled. Each prompt gets its own seed."""
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
    version: int  # of the weights when the request was submitted
    future: RolloutFuture


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

    def collect(self, num: int) -> list[tuple[VideoSample, Prompt, list[Rollout]]]:
        """Return this rank's shard of `num` answered prompts, after submitting what is missing."""
        self.submit(num)
        ctx, mesh = self._ctx, self._ctx.mesh
        oldest = self._state.version - ctx.cfg.rollout.max_staleness
        due = [request for request in self._in_flight if request.version <= oldest]
        ordered = due + [request for request in self._in_flight if request.version > oldest]
        count = min(len(shard(range(num), mesh.data, mesh.model)), len(ordered))
        with ctx.clock("rollout"):
            futures = [request.future for request in ordered]
            chosen = ctx.rollout_manager.wait(futures, required=min(len(due), count), count=count)
            taken = [ordered[index] for index in sorted(chosen)]
            answers = ctx.rollout_manager.results([request.future for request in taken])
        self._in_flight = [request for request in self._in_flight if request not in taken]
        return [(r.sample, r.prompt, a) for r, a in zip(taken, answers, strict=True)]

    def positions(self) -> list[int]:
        """Return the stream positions of all ranks' samples that are in flight, ascending."""
        own = [request.position for request in self._in_flight]
        return sorted(chain(*gather_objects(world_axis(self._ctx.mesh), own)))

    def _submit_new(self, num: int) -> None:
        """Draw `num` samples over all ranks and send this rank's shard to the engines."""
        ctx = self._ctx
        with ctx.clock("encode"):
            drawn = self._dataloader.take(num)
            prompts = ctx.embed([prepared.prompt for prepared in drawn])
        with ctx.clock("rollout"):
            positions = [prepared.position for prepared in drawn]
            futures = ctx.rollout_manager.submit(prompts, sampling_spec(ctx.cfg), positions)
        self._in_flight += [
            InFlightRequest(
                sample=prepared.sample,
                prompt=prompt,
                position=prepared.position,
                version=self._state.version,
                future=future,
            )
            for prepared, prompt, future in zip(drawn, prompts, futures, strict=True)
        ]
