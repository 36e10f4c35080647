"""One rank's weights on their way to the rollout workers, a bucket at a time.

Each worker gets them by the quickest way that it and this rank have, or by `rollout.transport`:

    cuda_ipc       both use one GPU: the worker reads the trainer's bucket there
    shared_memory  one machine: the worker maps the trainer's bucket
    broadcast      different machines: NCCL between GPUs, gloo without
    http           the bytes of the bucket behind a message

Two buckets exist at a time: one is filled while the workers load the other. When a broadcast
breaks, since one of its workers died, the others get that bucket and the rest as bytes; the next
hand-over makes a new group.
"""

import asyncio
import itertools
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from megatron_vrl.config.rollout import Transport
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import Bucket, BucketWriter, NamedTensors, visible_gpus
from megatron_vrl.rollout.identity import Member, machine
from megatron_vrl.rollout.workers.broadcast import Broken, Group, invitation
from megatron_vrl.rollout.workers.client import Fault, Undelivered, WorkerClient
from megatron_vrl.rollout.workers.protocol import Load, Version, encode, framed

HAND_OVER_TIMEOUT_S = 300

Way = Literal["shared_memory", "cuda_ipc", "broadcast", "http"]
Posts = dict[Member, "Future[bytes]"]
Filled = dict[bool, tuple[BucketWriter, Bucket]]  # on the GPU? -> the bucket there


@dataclass(frozen=True, slots=True)
class _Sent:
    """A bucket that workers are loading."""

    filled: Filled
    posts: Posts
    work: Any  # of the broadcast, or None


class WeightSender:
    def __init__(
        self, transport: Transport, dtype: torch.dtype, device: torch.device, link: WorkerClient
    ) -> None:
        """`device`: where this rank's weights are."""
        self.failed: set[str] = set()  # addresses that took no weights in this hand-over
        self._transport, self._link, self._device = transport, link, device
        gpu = device if device.type == "cuda" else None
        self._gpu = visible_gpus()[device.index or 0] if gpu else ""
        self._writers = {False: [BucketWriter(dtype) for _ in range(2)]}
        if gpu:
            self._writers[True] = [BucketWriter(dtype, gpu) for _ in range(2)]
        self._slots = itertools.cycle(range(2))
        self._sent: _Sent | None = None
        self._sender = uuid.uuid4().hex
        self._group: Group | None = None
        self._group_name, self._receivers = "", list[Member]()
        self._broken = False  # no broadcast any more in this hand-over

    def start(self, members: Sequence[Member]) -> None:
        """Begin a hand-over. One rank calls it, before any calls `load`."""
        self._to_all(members, "weights/start", b"")

    def load(self, members: Sequence[Member], tensors: NamedTensors) -> None:
        """Hand over one bucket. It is under way when this returns."""
        places = {self._on_gpu(self._way(member)) for member in members}
        slot, tensors = next(self._slots), list(tensors) if len(places) > 1 else tensors
        filled = {}
        for on_gpu in places:
            writer = self._writers[on_gpu][slot]
            filled[on_gpu] = writer, writer.write(tensors)
        self.settle()
        members = self._well(members)
        self._make_group([m for m in members if self._way(m) == "broadcast"])
        self._sent = self._begin(members, filled)

    def settle(self) -> None:
        """Wait until the bucket that is under way is loaded. Raises RolloutError."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        if sent.work is not None and self._group is not None:
            mine = [sent.posts[m] for m in self._receivers]
            try:
                self._group.finish(
                    sent.work,
                    HAND_OVER_TIMEOUT_S,
                    lost=lambda: any(post.done() and post.exception() for post in mine),
                )
            except Broken as error:
                self._give_up(error)
        if undelivered := self._outcomes(sent.posts):
            self._give_up("a worker did not receive it")
            self._outcomes(self._begin(undelivered, sent.filled).posts)

    def finish(self, members: Sequence[Member], version: int) -> None:
        """End a hand-over. One rank calls it, after all have called `settle`."""
        self._to_all(members, "weights/finish", encode(Version(version=version)))

    def forget_failures(self) -> None:
        """Before the next hand-over."""
        self.failed, self._broken = set(), False

    def takes_turns(self, members: Sequence[Member]) -> bool:
        """Whether ranks must not send at the same time: broadcasts of two groups with the same
        workers may wait for each other."""
        return any(self._way(member) == "broadcast" for member in members)

    def close(self) -> None:
        self._leave_group()
        for writer in itertools.chain(*self._writers.values()):
            writer.close()

    # Ways.

    def _way(self, member: Member) -> Way:
        """Raises RolloutError if the way that was asked for does not lead there."""
        here = member.machine == machine()
        same_gpu = here and self._gpu in member.gpus
        if self._transport == "auto":
            way: Way = "cuda_ipc" if same_gpu else "shared_memory" if here else "broadcast"
        else:
            way = self._transport
        if (way == "shared_memory" and not here) or (way == "cuda_ipc" and not same_gpu):
            shared = "machine" if way == "shared_memory" else "GPU"
            raise RolloutError(
                f"rollout.transport={way}: the worker at {member.address} does not use the "
                f"trainer's {shared}; set rollout.transport=auto."
            )
        return "http" if way == "broadcast" and self._broken else way

    def _on_gpu(self, way: Way) -> bool:
        """Whether the bucket must lie on the GPU for it."""
        return way == "cuda_ipc" or (way == "broadcast" and bool(self._gpu))

    def _begin(self, members: Sequence[Member], filled: Filled) -> _Sent:
        posts, bodies, work = Posts(), dict[Way, tuple[bytes, memoryview | None]](), None
        for member in members:
            way = self._way(member)
            writer, bucket = filled.get(self._on_gpu(way)) or next(iter(filled.values()))
            if way not in bodies:
                follows = writer.contents(bucket) if way == "http" else None
                group = self._group_name if way == "broadcast" else ""
                load = Load(bucket=bucket, follows=follows is not None, group=group)
                bodies[way] = framed(load), follows
            posts[member] = self._post(member, "weights/load", *bodies[way])
        if "broadcast" in bodies and self._group is not None:
            writer, bucket = filled[self._on_gpu("broadcast")]
            work = self._group.start(writer.flat(bucket))
        return _Sent(filled, posts, work)

    # The group of a broadcast.

    def _make_group(self, receivers: list[Member]) -> None:
        """Unless there is one with these."""
        if not receivers or (self._group is not None and receivers == self._receivers):
            return
        self._leave_group()
        nccl = bool(self._gpu) and all(member.gpus for member in receivers)
        if self._gpu and not nccl:
            raise RolloutError(
                "The trainer has a GPU and a worker on another machine has none: set "
                "rollout.transport=http."
            )
        join, listener = invitation(
            receivers[0].address,
            self._sender,
            1 + len(receivers),
            self._device,
            "nccl" if nccl else "gloo",
        )
        posts = {
            member: self._post(member, "weights/join", encode(replace(join, rank=rank)))
            for rank, member in enumerate(receivers, start=1)
        }
        try:
            self._group = Group(join, join.host, listener)
        except Broken as error:
            self._give_up(error)
        self._group_name, self._receivers = join.name, receivers
        if self._outcomes(posts) or self.failed.intersection(m.address for m in receivers):
            self._give_up("a worker did not join")

    def _give_up(self, reason: object) -> None:
        if not self._broken:
            say(f"broadcast of weights given up, the rest goes by http ({reason})")
        self._broken = True
        self._leave_group()

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._receivers = None, []

    # Messages.

    def _well(self, members: Sequence[Member]) -> list[Member]:
        return [member for member in members if member.address not in self.failed]

    def _to_all(self, members: Sequence[Member], path: str, body: bytes) -> None:
        self._outcomes({m: self._post(m, path, body) for m in self._well(members)})

    def _post(
        self, member: Member, path: str, body: bytes, follows: memoryview | None = None
    ) -> "Future[bytes]":
        async def post() -> bytes:
            answer = self._link.post(member.address, path, body, follows)
            return await asyncio.wait_for(answer, HAND_OVER_TIMEOUT_S)

        return self._link.start(post())

    def _outcomes(self, posts: Posts) -> list[Member]:
        """Wait for them; the members that a broadcast did not reach. Raises RolloutError."""
        undelivered = []
        for member, post in posts.items():
            try:
                post.result()
            except Undelivered:
                undelivered.append(member)
            except (Fault, TimeoutError) as fault:
                self.failed.add(member.address)
                say(f"{member.address} takes no weights ({fault})")
        return undelivered


def say(sentence: str) -> None:
    with suppress(OSError):
        print(f"rollout: {sentence}", file=sys.stderr, flush=True)
