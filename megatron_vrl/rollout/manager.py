"""Rollouts as the loops know them: weights handed over, prompts answered, all ranks in step.

A hand-over reaches every engine that is well: with engines in the trainer's processes every rank
takes the whole model, with workers each pipeline stage sends them its own layers. It ends by
dropping what the engines cached of the old weights, and answers carry its version. Checksums of the
live weights are compared with the trainer's at the first hand-over and at every k-th, unless the
engine makes FP8 of them.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_vrl import config
from megatron_vrl.checkpoint.hf_export import NamedTensors, WeightExport
from megatron_vrl.errors import RolloutError
from megatron_vrl.parallel.mesh import Mesh, gather_objects, raise_on_all_ranks, world_axis
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.fp8_emulation import rounded
from megatron_vrl.rollout.identity import Member
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.types import Prompt, Rollout

LOOK_EVERY_S = 0.005  # whether answers have come; a token takes longer
PAUSE_S = 0.5  # before weights are offered again


class Asked(Protocol):
    """A prompt that is being answered."""

    @property
    def done(self) -> bool: ...

    def result(self) -> list[Rollout]:
        """Raises RolloutError."""
        ...


class Engine(Protocol):
    """One rank's end of whatever answers."""

    everywhere: bool  # whether every rank needs the whole model in a hand-over
    takes_weights: bool  # False: a hand-over is but a version

    def ask(self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]) -> Sequence[Asked]: ...
    @property
    def starved(self) -> bool:
        """Whether nobody is left to answer."""
        ...

    def gather(self, at_least: int) -> list[Member]: ...
    def start(self, members: Sequence[Member]) -> None: ...
    def takes_turns(self, members: Sequence[Member]) -> bool:
        """Whether pipeline stages must send one after another."""
        ...

    def load(self, members: Sequence[Member], tensors: NamedTensors) -> None: ...
    def settle(self) -> None:
        """Wait until what `load` began is done."""
        ...

    def finish(self, members: Sequence[Member], version: int) -> None: ...
    @property
    def failed(self) -> set[str]: ...
    def enlist(self, members: Sequence[Member], version: int) -> None: ...
    def checksums(self) -> dict[str, dict[str, str]]: ...


class RolloutManager:
    """Every rank calls every method, in the same order."""

    def __init__(
        self,
        cfg: config.Rollout,
        mesh: Mesh,
        engine: Engine,
        export: WeightExport,
        dtype: torch.dtype,
        banned_token_ids: tuple[int, ...],
    ) -> None:
        self.banned_token_ids = banned_token_ids  # which no answer holds
        self.version: int | None = None  # of the weights that the engines hold
        self._cfg, self._mesh, self._engine = cfg, mesh, engine
        self._export, self._dtype = export, dtype
        self._as_sent = rounded if cfg.quantization == "fp8_emulated" else iter
        self._hand_overs = 0

    def sync_weights(self, version: int) -> None:
        """Give the engines the trainer's weights, unless they hold this version already."""
        if self.version != version:
            self._sync_all(version, self._cfg.min_workers if self.version is None else 1)
            if self._engine.takes_weights and self._cfg.quantization != "fp8":
                self._check_now_and_then()

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, numbers: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """`spec.n` answers to each of this rank's prompts; `numbers` as in `ask`.

        Raises RolloutError on every rank if a prompt of any rank cannot be answered.
        """
        asked = self.ask(prompts, spec, range(len(prompts)) if numbers is None else numbers)
        self.first(asked, required=len(asked), count=len(asked))
        return self.results(asked)

    def ask(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, numbers: Sequence[int]
    ) -> Sequence[Asked]:
        """Begin to answer; prompt `i` draws as `spec.of_prompt(numbers[i])` says. Workers go on
        while the trainer does something else."""
        with raise_on_all_ranks(self._mesh):
            return self._engine.ask(prompts, [spec.of_prompt(number) for number in numbers])

    def first(self, asked: Sequence[Asked], required: int, count: int) -> list[int]:
        """Wait; the indices of `count` of this rank's prompts that are answered. The first
        `required` are among them, the others are those that were ready first.

        When no engine is left, the weights are handed over again to whoever comes back, and the
        same prompts go on.
        """
        while True:
            chosen = self._waited(asked, required, count)
            if not any(gather_objects(world_axis(self._mesh), chosen is None)):
                assert chosen is not None
                return chosen
            assert self.version is not None
            self._sync_all(self.version, 1)

    def results(self, asked: Sequence[Asked]) -> list[list[Rollout]]:
        """The answers to prompts that `first` gave. Raises RolloutError on every rank alike."""
        with raise_on_all_ranks(self._mesh):
            return [one.result() for one in asked]

    def _waited(self, asked: Sequence[Asked], required: int, count: int) -> list[int] | None:
        """None: nobody is left to wait for."""
        while True:
            done = [index for index, one in enumerate(asked) if one.done]
            chosen = (done[:required] + [i for i in done if i >= required])[:count]
            if len(chosen) == count and all(one.done for one in asked[:required]):
                return chosen
            if self._engine.starved:
                return None
            time.sleep(LOOK_EVERY_S)

    def _sync_all(self, version: int, at_least: int) -> None:
        """Until somebody holds the weights. Raises RolloutError on every rank if nobody takes them
        within rollout.worker_wait_timeout_s."""
        deadline = time.monotonic() + self._cfg.worker_wait_timeout_s
        while not self._sync_agreed(version, at_least):
            if gather_objects(world_axis(self._mesh), time.monotonic() > deadline)[0]:
                raise RolloutError(
                    "No rollout worker took the weights within rollout.worker_wait_timeout_s="
                    f"{self._cfg.worker_wait_timeout_s:g}: look at the workers' output."
                )
            time.sleep(PAUSE_S)
        self.version = version

    def _sync_agreed(self, version: int, at_least: int) -> bool:
        engine, first = self._engine, self._mesh.rank == 0
        with raise_on_all_ranks(self._mesh):
            members = engine.gather(at_least) if first else []
        if not engine.everywhere:
            members = gather_objects(world_axis(self._mesh), members)[0]
        starts = first or engine.everywhere
        with raise_on_all_ranks(self._mesh):
            if starts:
                engine.start(members)
        if engine.takes_weights:
            self._send(members)
        with raise_on_all_ranks(self._mesh):
            if starts:
                engine.finish(members, version)
        failed = set().union(*gather_objects(world_axis(self._mesh), engine.failed))
        took = [member for member in members if member.address not in failed]
        engine.enlist(took, version)
        return engine.everywhere or bool(took)

    def _send(self, members: Sequence[Member]) -> None:
        pipeline, world = self._mesh.pipeline, world_axis(self._mesh)
        with raise_on_all_ranks(self._mesh):
            mine = self._engine.takes_turns(members)
        in_turn = any(gather_objects(world, mine))
        error = None
        for turn in range(pipeline.size if in_turn else 1):
            if not in_turn or turn == pipeline.rank:
                error = self._send_own(members)
            with raise_on_all_ranks(self._mesh):
                if error is not None:
                    raise error

    def _send_own(self, members: Sequence[Member]) -> RolloutError | None:
        export, engine, error = self._export, self._engine, None
        sends = engine.everywhere or export.leads
        for bucket in export.buckets() if engine.everywhere else export.own_buckets():
            try:
                if error is None and sends:
                    engine.load(members, self._as_sent(bucket))
            except RolloutError as caught:
                error = caught
            _exhaust(bucket)
        try:
            if error is None and sends:
                engine.settle()
        except RolloutError as caught:
            error = caught
        return error

    def _check_now_and_then(self) -> None:
        if self._hand_overs % self._cfg.check_weights_every == 0:
            self._check_weights()
        self._hand_overs += 1

    def _check_weights(self) -> None:
        """Raises RolloutError if an engine computes with other weights than the trainer's."""
        ours = tensor_checksums(self._as_sent(self._export.tensors()), self._dtype)
        with raise_on_all_ranks(self._mesh):
            theirs = self._engine.checksums() if self._checks else {}
            for engine, sums in theirs.items():
                wrong = sorted(name for name in ours if sums.get(name) != ours[name])
                if wrong:
                    raise RolloutError(
                        f"After a hand-over the engine of {engine} (rank {self._mesh.rank}) "
                        f"differs from the trainer in {len(wrong)} tensors, first {wrong[0]}: "
                        "check the vllm version."
                    )

    @property
    def _checks(self) -> bool:
        return self._engine.everywhere or self._mesh.rank == 0


def _exhaust(bucket: Iterator[object]) -> None:
    """A bucket is a collective: every rank takes part to its end."""
    for _ in bucket:
        pass
