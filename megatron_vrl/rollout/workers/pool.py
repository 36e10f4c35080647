"""Rollouts from worker processes, wherever they run; the trainer's end.

A worker that cannot be reached, does not answer its health check for `heartbeat_timeout_s`, takes
longer than `request_timeout_s` for a group, was started anew, holds old weights or answers garbage
is lost: its groups are asked of the others, and it gets no more work until the next hand-over of
weights finds it well. Every group is answered once: what a lost worker still says is not listened
to.

When no worker is left, `starved` says so; a hand-over to whoever is there by then goes on where
it stopped. Calls are of one rank; what all ranks must agree on is in `rollouts.py`.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import NamedTensors, torch_dtype
from megatron_vrl.rollout.identity import Health, Identity, Member
from megatron_vrl.rollout.request import Request, SamplingSpec, check_length, request_of
from megatron_vrl.rollout.workers.client import Fault, Unreachable, WorkerClient, decode_or_fault
from megatron_vrl.rollout.workers.discovery import found
from megatron_vrl.rollout.workers.protocol import Answered, Ask, Checksums, encode
from megatron_vrl.rollout.workers.weight_sender import WeightSender, say
from megatron_vrl.types import Prompt, Rollout

LOOK_EVERY_S = 0.5
MOST_FAULTS = 4  # of one group; then it is the group that breaks workers


@dataclass(slots=True)
class _Worker:
    member: Member
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    groups: int = 0  # under way, of this rank


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt that workers are answering."""

    group: "Future[list[Rollout]]"

    @property
    def done(self) -> bool:
        return self.group.done()

    def result(self) -> list[Rollout]:
        """Raises RolloutError."""
        return self.group.result()


class WorkerPool:
    everywhere = False  # weights are sent by one rank of each pipeline stage
    takes_weights = True

    def __init__(self, cfg: config.Rollout, identity: Identity, device: torch.device) -> None:
        """`device`: where this rank's weights are."""
        self.version: int | None = None
        self._cfg, self._identity = cfg, identity
        self._workers: dict[str, _Worker] = {}
        self._link = WorkerClient()
        self._delivery = WeightSender(
            cfg.transport, torch_dtype(identity.dtype), device, self._link
        )
        self._changed = self._link.call(_new_event())

    # Answers.

    def ask(self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]) -> list[Asked]:
        """Begin to answer. Raises RolloutError if one does not fit the workers."""
        requests = [request_of(prompt) for prompt in prompts]
        for request, spec in zip(requests, specs, strict=True):
            check_length(request, spec, self._identity.max_model_len)
        version = self._known_version()
        return [
            Asked(self._link.start(self._answered(request, spec, version)))
            for request, spec in zip(requests, specs, strict=True)
        ]

    @property
    def starved(self) -> bool:
        """Whether no worker is left to answer."""
        return not self._workers

    async def _answered(self, request: Request, spec: SamplingSpec, version: int) -> list[Rollout]:
        ask = encode(Ask(request=request, spec=spec, version=version))
        for _ in range(MOST_FAULTS):
            worker = await self._free_worker(spec.n)
            worker.groups += 1
            try:
                rollouts = await self._one_answer(worker, ask)
                self._check(rollouts, spec, version)
            except Fault as fault:
                self._lose(worker, f"sample {request.id}: {fault}")
            else:
                return rollouts
            finally:
                worker.groups -= 1
                self._announce_change()
        raise RolloutError(
            f"Sample {request.id}: {MOST_FAULTS} workers failed while they answered it; look at "
            "their output, and at the sample."
        )

    async def _one_answer(self, worker: _Worker, ask: bytes) -> list[Rollout]:
        """Raises Fault, or RolloutError if no worker can answer this."""
        answer = asyncio.ensure_future(self._link.post(worker.member.address, "generate", ask))
        lost = asyncio.ensure_future(worker.lost.wait())
        await asyncio.wait(
            [answer, lost],
            timeout=self._cfg.request_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        lost.cancel()
        if answer.done():
            return decode_or_fault(answer.result(), Answered).rollouts
        answer.cancel()
        if worker.lost.is_set():
            raise Fault("the worker was lost")
        raise Fault(f"no answer within request_timeout_s={self._cfg.request_timeout_s:g}")

    async def _free_worker(self, answers: int) -> _Worker:
        """The one with the least to do, as soon as one has room. Groups wait here and not at a
        worker, so that a slow one holds few of them."""
        most = max(1, -(-self._cfg.max_num_seqs // answers))
        while True:
            free = [worker for worker in self._workers.values() if worker.groups < most]
            if free:
                return min(free, key=lambda worker: worker.groups)
            await self._changed.wait()

    def _check(self, rollouts: Sequence[Rollout], spec: SamplingSpec, version: int) -> None:
        """Raises Fault for answers that this pool's weights and this spec cannot have given."""
        if len(rollouts) != spec.n:
            raise Fault(f"{len(rollouts)} answers of {spec.n}")
        for index, rollout in enumerate(rollouts):
            if not 0 < len(rollout.token_ids) == len(rollout.logprobs) <= spec.max_tokens:
                raise Fault(f"{len(rollout.token_ids)} tokens, {len(rollout.logprobs)} log-probs")
            if rollout.seed != spec.seed + index:
                raise Fault(f"seed {rollout.seed}, not {spec.seed + index}")
            if not version <= rollout.weight_version <= rollout.newest_version <= self._newest():
                raise Fault(f"weights {rollout.weight_version}, not {version}")

    # Weights.

    def gather(self, at_least: int) -> list[Member]:
        """Workers that can be reached now; waits up to `worker_wait_timeout_s`. Of one rank.

        Raises RolloutError if they are too few, or one serves something else.
        """
        return self._link.call(self._gathered(at_least))

    def start(self, members: Sequence[Member]) -> None:
        """Begin a hand-over to these workers. One rank calls it, before any calls `load`."""
        self._delivery.start(members)

    def takes_turns(self, members: Sequence[Member]) -> bool:
        return self._delivery.takes_turns(members)

    def load(self, members: Sequence[Member], tensors: NamedTensors) -> None:
        """Hand over one bucket; it is under way until `settle`. One rank of each pipeline stage."""
        self._delivery.load(members, tensors)

    def settle(self) -> None:
        self._delivery.settle()

    def finish(self, members: Sequence[Member], version: int) -> None:
        """End a hand-over. One rank calls it, after all have called `settle`."""
        self._delivery.finish(members, version)

    @property
    def failed(self) -> set[str]:
        """Addresses that this rank could not hand the weights to."""
        return self._delivery.failed

    def enlist(self, members: Sequence[Member], version: int) -> None:
        """These workers hold the weights `version` and answer from now on. Every rank calls it."""
        self.version = version
        self._delivery.forget_failures()
        self._link.call(self._enlisted(members))

    def checksums(self) -> dict[str, dict[str, str]]:
        """Address -> SHA-256 of every live weight by published name. Raises RolloutError."""
        return {
            address: self._link.call(self._checksums(address)) for address in list(self._workers)
        }

    def close(self) -> None:
        self._delivery.close()
        self._link.close()

    async def _gathered(self, at_least: int) -> list[Member]:
        deadline = self._link.loop.time() + self._cfg.worker_wait_timeout_s
        while True:
            addresses = list(dict.fromkeys([*self._cfg.workers, *found(self._cfg.discovery_dir)]))
            states = await asyncio.gather(*(self._health(a) for a in addresses))
            well = {a: s for a, s in zip(addresses, states, strict=True) if isinstance(s, Health)}
            for address, health in well.items():
                self._check_identity(address, health)
            if len(well) >= at_least:
                return [Member(a, h.instance, h.machine, h.gpus) for a, h in well.items()]
            if self._link.loop.time() > deadline:
                seen = "; ".join(f"{a}: {s}" for a, s in zip(addresses, states, strict=True))
                raise RolloutError(
                    f"{len(well)} of at least {at_least} rollout workers came within rollout."
                    f"worker_wait_timeout_s={self._cfg.worker_wait_timeout_s:g} "
                    f"({seen or 'no address is known'}): start them with "
                    "launch/rollout_worker.sh, and name them in rollout.workers or "
                    "rollout.discovery_dir."
                )
            await asyncio.sleep(LOOK_EVERY_S)

    def _check_identity(self, address: str, health: Health) -> None:
        for name in ("architecture", "dtype", "max_model_len", "banned_tokens"):
            theirs, ours = getattr(health.identity, name), getattr(self._identity, name)
            if theirs != ours:
                raise RolloutError(
                    f"The worker at {address} serves {name} {theirs}, the trainer {ours}: start it "
                    "with the trainer's config."
                )

    async def _enlisted(self, members: Sequence[Member]) -> None:
        for worker in list(self._workers.values()):
            if worker.member not in members:
                self._lose(worker, "it has no part in the hand-over of weights")
        for member in members:
            if member.address not in self._workers:
                worker = self._workers[member.address] = _Worker(member)
                _keep(asyncio.ensure_future(self._watch(worker)))
        self._announce_change()

    async def _checksums(self, address: str) -> dict[str, str]:
        try:
            return decode_or_fault(
                await self._link.post(address, "checksums", b""), Checksums
            ).by_name
        except Fault as fault:
            raise RolloutError(
                f"The worker at {address} gives no checksums ({fault}): look at its output."
            ) from None

    # One worker.

    async def _watch(self, worker: _Worker) -> None:
        """Lose the worker when it falls silent or is another one at the same address."""
        heard = self._link.loop.time()
        while not worker.lost.is_set():
            state = await self._health(worker.member.address)
            if isinstance(state, Health):
                heard = self._link.loop.time()
                if state.instance != worker.member.instance:
                    self._lose(worker, "it was started anew")
            elif isinstance(state, Unreachable) or (
                self._link.loop.time() - heard > self._cfg.heartbeat_timeout_s
            ):
                self._lose(worker, f"no word for {self._link.loop.time() - heard:.1f} s: {state}")
            await asyncio.sleep(min(LOOK_EVERY_S, self._cfg.heartbeat_timeout_s / 4))

    def _lose(self, worker: _Worker, reason: str) -> None:
        if not worker.lost.is_set():
            worker.lost.set()
            if self._workers.get(worker.member.address) is worker:
                del self._workers[worker.member.address]
            say(f"lost {worker.member.address}: {reason}")
            self._announce_change()

    async def _health(self, address: str) -> "Health | Fault":
        try:
            return await self._link.health(address, max(0.1, self._cfg.heartbeat_timeout_s / 2))
        except Fault as fault:
            return fault

    def _announce_change(self) -> None:
        """Wake whoever waits for a worker or for an answer."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _known_version(self) -> int:
        if self.version is None:
            raise RolloutError("The workers have no weights yet; hand them over first.")
        return self.version

    def _newest(self) -> int:
        """Weights that are being handed over may answer before all ranks know of it."""
        return self._known_version() + 1


_tasks: set[asyncio.Task[Any]] = set()


def _keep(task: "asyncio.Task[Any]") -> None:
    """asyncio itself holds tasks weakly."""
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _new_event() -> asyncio.Event:
    return asyncio.Event()
