"""The engine inside this trainer process, as `rollouts.RolloutManager` sees engines.

It answers at once, so there is nothing to wait for, and it sleeps while the trainer works.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vrl.rollout.buckets import NamedTensors
from megatron_vrl.rollout.identity import Member
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.types import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class Answers:
    """To one prompt."""

    rollouts: list[Rollout]
    done: bool = True

    def result(self) -> list[Rollout]:
        return self.rollouts


class InProcessEngine:
    everywhere = True  # every rank's engine takes the whole model
    takes_weights = True

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine

    def ask(self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]) -> list[Answers]:
        self._engine.wake()
        groups = self._engine.answer(prompts, specs)
        self._engine.sleep()
        return [Answers(group) for group in groups]

    @property
    def starved(self) -> bool:
        return False

    def gather(self, at_least: int) -> list[Member]:
        return []

    def start(self, members: Sequence[Member]) -> None:
        self._engine.wake()
        self._engine.start_update()

    def takes_turns(self, members: Sequence[Member]) -> bool:
        return False

    def load(self, members: Sequence[Member], tensors: NamedTensors) -> None:
        self._engine.load(tensors)

    def settle(self) -> None:
        """Nothing is ever under way."""

    def finish(self, members: Sequence[Member], version: int) -> None:
        self._engine.finish_update(version)

    @property
    def failed(self) -> set[str]:
        return set()

    def enlist(self, members: Sequence[Member], version: int) -> None:
        """There is but one."""

    def checksums(self) -> dict[str, dict[str, str]]:
        return {"this process": self._engine.weights_checksum()}
