"""Sender of one rank's weights to rollout workers, a bucket at a time.

Each worker gets a bucket by `rollout.transport`, or with `auto` by the first of these that the
worker and this rank share:

    cuda_ipc       one GPU: the worker opens the trainer's bucket on the GPU
    shared_memory  one machine: the worker maps the trainer's bucket
    broadcast      different machines: NCCL between GPUs, otherwise gloo
    http           any: the bytes of the bucket follow a message (only if it is asked for)

Two buckets exist at a time. Life of a bucket:

    FILLED     push: the tensors are copied into the free one of the two buckets
    IN FLIGHT  push: after a `flush` of the bucket before, it is offered to all workers
    LOADED     flush: every worker has loaded it, or has failed; its memory is free again

Example with buckets 0, 1, 2: push(0) fills A and sends it. push(1) fills B while the workers load
A, then flushes A and sends B. push(2) fills A again, flushes B and sends A. flush() waits for A.

If a broadcast fails because a worker died, the other workers get that bucket and the rest of the
weight sync by http. The next weight sync makes a new broadcast group.
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
from megatron_vrl.rollout.buckets import BucketWriter, NamedTensors, WeightBucket, visible_gpus
from megatron_vrl.rollout.workers.broadcast import BroadcastError, BroadcastGroup, invitation
from megatron_vrl.rollout.workers.client import BucketNotReceived, WorkerClient, WorkerError
from megatron_vrl.rollout.workers.protocol import CommitWeights, LoadBucket, encode, framed
from megatron_vrl.rollout.workers.worker_info import WorkerInfo, machine

SYNC_TIMEOUT_S = 300

ResolvedTransport = Literal["shared_memory", "cuda_ipc", "broadcast", "http"]
Posts = dict[WorkerInfo, "Future[bytes]"]
Filled = dict[bool, tuple[BucketWriter, WeightBucket]]  # True: on the GPU, False: in host memory


@dataclass(frozen=True, slots=True)
class _InFlightBucket:
    """A bucket that workers are loading. work: handle of its broadcast, or None."""

    filled: Filled
    posts: Posts
    work: Any


class WeightSender:
    """One rank's bucket memory, and its connections for weight syncs."""

    def __init__(
        self, transport: Transport, dtype: torch.dtype, device: torch.device, client: WorkerClient
    ) -> None:
        """device: where this rank's weights are."""
        self.failed: set[str] = set()  # addresses that did not take the weights of this sync
        self._transport, self._client, self._device = transport, client, device
        gpu = device if device.type == "cuda" else None
        self._gpu = visible_gpus()[device.index or 0] if gpu else ""
        self._writers = {False: [BucketWriter(dtype) for _ in range(2)]}
        if gpu:
            self._writers[True] = [BucketWriter(dtype, gpu) for _ in range(2)]
        self._slots = itertools.cycle(range(2))
        self._in_flight: _InFlightBucket | None = None
        self._sender = uuid.uuid4().hex
        self._group: BroadcastGroup | None = None
        self._group_name, self._receivers = "", list[WorkerInfo]()
        self._broadcast_failed = False  # True: the rest of this sync goes by http

    def begin_sync(self, workers: Sequence[WorkerInfo]) -> None:
        """Invalidate the workers' weights. One rank calls it, before any rank pushes."""
        self._post_to_all(workers, "weights/begin", b"")

    def push(self, workers: Sequence[WorkerInfo], tensors: NamedTensors) -> None:
        """Send one bucket to the workers that have not failed. It is in flight on return."""
        memories = {self._needs_gpu_memory(self._transport_to(worker)) for worker in workers}
        slot, tensors = next(self._slots), list(tensors) if len(memories) > 1 else tensors
        filled = {}
        for on_gpu in memories:
            writer = self._writers[on_gpu][slot]
            filled[on_gpu] = writer, writer.write(tensors)
        self.flush()
        workers = self._not_failed(workers)
        self._make_group([w for w in workers if self._transport_to(w) == "broadcast"])
        self._in_flight = self._start_transfer(workers, filled)

    def flush(self) -> None:
        """Wait until the bucket in flight is loaded. Raises RolloutError."""
        if self._in_flight is None:
            return
        in_flight, self._in_flight = self._in_flight, None
        if in_flight.work is not None and self._group is not None:
            receiving = [in_flight.posts[worker] for worker in self._receivers]
            try:
                self._group.finish(
                    in_flight.work,
                    SYNC_TIMEOUT_S,
                    lost=lambda: any(post.done() and post.exception() for post in receiving),
                )
            except BroadcastError as error:
                self._abandon_broadcast(error)
        if not_received := self._wait_for(in_flight.posts):
            self._abandon_broadcast("a worker did not receive it")
            self._wait_for(self._start_transfer(not_received, in_flight.filled).posts)

    def commit(self, workers: Sequence[WorkerInfo], version: int) -> None:
        """End a weight sync. One rank calls it, after all ranks have flushed."""
        self._post_to_all(workers, "weights/commit", encode(CommitWeights(version=version)))

    def forget_failures(self) -> None:
        """Reset `failed` and allow broadcasts; call it between two weight syncs."""
        self.failed, self._broadcast_failed = set(), False

    def serialize_stages(self, workers: Sequence[WorkerInfo]) -> bool:
        """Return True if ranks must send one after another.

        Broadcasts of two groups with the same workers may deadlock.
        """
        return any(self._transport_to(worker) == "broadcast" for worker in workers)

    def close(self) -> None:
        """Leave the broadcast group and free both buckets."""
        self._leave_group()
        for writer in itertools.chain(*self._writers.values()):
            writer.close()

    # Transports.

    def _transport_to(self, worker: WorkerInfo) -> ResolvedTransport:
        """Return the transport to a worker. Raises RolloutError if it cannot reach the worker."""
        same_machine = worker.machine == machine()
        same_gpu = same_machine and bool(self._gpu) and self._gpu in worker.gpus
        transport = self._transport
        if transport == "auto":
            transport = "cuda_ipc" if same_gpu else "shared_memory" if same_machine else "broadcast"
        for needs, shared, is_shared in (
            ("shared_memory", "machine", same_machine),
            ("cuda_ipc", "GPU", same_gpu),
        ):
            if transport == needs and not is_shared:
                raise RolloutError(
                    f"rollout.transport={transport}: the worker at {worker.address} does not use "
                    f"the trainer's {shared}: set rollout.transport=auto."
                )
        if transport == "broadcast" and same_gpu:
            raise RolloutError(
                f"rollout.transport=broadcast: the worker at {worker.address} uses the trainer's "
                "GPU, and NCCL refuses two ranks on one GPU: set rollout.transport=auto."
            )
        return "http" if transport == "broadcast" and self._broadcast_failed else transport

    def _needs_gpu_memory(self, transport: ResolvedTransport) -> bool:
        """Return True if this transport sends from GPU memory."""
        return transport == "cuda_ipc" or (transport == "broadcast" and bool(self._gpu))

    def _start_transfer(self, workers: Sequence[WorkerInfo], filled: Filled) -> _InFlightBucket:
        """Offer a filled bucket to the workers, each by its transport."""
        posts, work = Posts(), None
        bodies: dict[ResolvedTransport, tuple[bytes, memoryview | None]] = {}
        for worker in workers:
            transport = self._transport_to(worker)
            writer, bucket = filled.get(self._needs_gpu_memory(transport)) or next(
                iter(filled.values())
            )
            if transport not in bodies:
                follows = writer.contents(bucket) if transport == "http" else None
                group = self._group_name if transport == "broadcast" else ""
                load = LoadBucket(bucket=bucket, follows=follows is not None, group=group)
                bodies[transport] = framed(load), follows
            posts[worker] = self._post(worker, "weights/load", *bodies[transport])
        if "broadcast" in bodies and self._group is not None:
            writer, bucket = filled[self._needs_gpu_memory("broadcast")]
            work = self._group.start(writer.flat(bucket))
        return _InFlightBucket(filled, posts, work)

    # Broadcast group.

    def _make_group(self, receivers: list[WorkerInfo]) -> None:
        """Make the broadcast group of these workers, unless the current one has the same."""
        if not receivers or (self._group is not None and receivers == self._receivers):
            return
        self._leave_group()
        nccl = bool(self._gpu) and all(worker.gpus for worker in receivers)
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
            worker: self._post(worker, "weights/join", encode(replace(join, rank=rank)))
            for rank, worker in enumerate(receivers, start=1)
        }
        try:
            self._group = BroadcastGroup(join, join.host, listener)
        except BroadcastError as error:
            self._abandon_broadcast(error)
        self._group_name, self._receivers = join.name, receivers
        if self._wait_for(posts) or self.failed.intersection(
            worker.address for worker in receivers
        ):
            self._abandon_broadcast("a worker did not join")

    def _abandon_broadcast(self, reason: object) -> None:
        """Send the rest of this weight sync by http."""
        if not self._broadcast_failed:
            log(f"weight broadcast failed, the rest of this sync goes by http ({reason})")
        self._broadcast_failed = True
        self._leave_group()

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._receivers = None, []

    # Messages.

    def _not_failed(self, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
        return [worker for worker in workers if worker.address not in self.failed]

    def _post_to_all(self, workers: Sequence[WorkerInfo], path: str, body: bytes) -> None:
        posts = {w: self._post(w, path, body) for w in self._not_failed(workers)}
        self._wait_for(posts)

    def _post(
        self, worker: WorkerInfo, path: str, body: bytes, follows: memoryview | None = None
    ) -> "Future[bytes]":
        async def post() -> bytes:
            response = self._client.post(worker.address, path, body, follows)
            return await asyncio.wait_for(response, SYNC_TIMEOUT_S)

        return self._client.start(post())

    def _wait_for(self, posts: Posts) -> list[WorkerInfo]:
        """Wait for all responses and return the workers that a broadcast did not reach.

        A worker that fails is added to `failed`. Raises RolloutError.
        """
        not_received = []
        for worker, post in posts.items():
            try:
                post.result()
            except BucketNotReceived:
                not_received.append(worker)
            except (WorkerError, TimeoutError) as error:
                self.failed.add(worker.address)
                log(f"{worker.address} took no weights ({error})")
        return not_received


def log(sentence: str) -> None:
    """Print a sentence to stderr. A closed stderr is ignored: the run goes on without its log."""
    with suppress(OSError):
        print(f"rollout: {sentence}", file=sys.stderr, flush=True)
