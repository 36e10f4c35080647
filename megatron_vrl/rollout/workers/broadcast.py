"""Broadcast of weight buckets to workers that share no memory with the sender.

A group is independent of torch.distributed's default group, so its workers may die. A new group is
made when the workers change. The backend is NCCL between GPUs, gloo otherwise. No call waits
forever: both sides poll the broadcast and abandon it when the other end is gone.

Like every process group of torch, a group is neither encrypted nor authenticated. It listens on an
address that leads to the workers, and joining needs a random name that is sent over HTTP only.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

JOIN_TIMEOUT_S = 30
POLL_INTERVAL_S = 0.001


class BroadcastError(Exception):
    """Failed broadcast, or a group that could not be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinBroadcast:
    """Body of POST /weights/join: invitation of one worker to a sender's group."""

    name: str
    sender: str  # id of the sender; a new group replaces its older one
    host: str  # where the sender listens
    port: int
    rank: int
    size: int
    backend: Literal["nccl", "gloo"]
    device: str = "cpu"  # of the sender; a worker uses its own


class BroadcastGroup:
    """Process group of one sender (rank 0) and its workers."""

    def __init__(
        self, join: JoinBroadcast, own_host: str, listener: socket.socket | None = None
    ) -> None:
        """Join the group; all ranks call it together.

        listener: the sender's socket at join.host, join.port. None for workers.
        Raises BroadcastError if a rank does not join within JOIN_TIMEOUT_S.
        """
        timeout = timedelta(seconds=JOIN_TIMEOUT_S)
        try:
            store = dist.TCPStore(
                join.host,
                join.port,
                is_master=listener is not None,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=None if listener is None else listener.detach(),
            )
            named = dist.PrefixStore(join.name, store)
            named.set(f"rank {join.rank}", "here")  # NCCL waits forever for a missing rank
            named.wait([f"rank {rank}" for rank in range(join.size)], timeout)
            self._group = _make(named, join, own_host, timeout)
        except (RuntimeError, OSError) as error:
            raise BroadcastError(_first_line(error)) from None
        self._store = store  # must live as long as the group
        self._options = dist.BroadcastOptions()
        self._options.rootRank = self._options.rootTensor = 0

    def start(self, flat: torch.Tensor) -> Any:
        """Start to send or receive these bytes and return the handle for `finish`."""
        return self._group.broadcast([flat], self._options)

    def finish(self, work: Any, timeout_s: float, lost: Callable[[], bool] = lambda: False) -> None:
        """Wait until the broadcast is done.

        lost: polled; True abandons the broadcast.
        Raises BroadcastError after `timeout_s`, if an end is gone, or if `lost` returns True.
        """
        deadline = time.monotonic() + timeout_s
        while not work.is_completed():
            if lost():
                raise BroadcastError("a worker was lost")
            if time.monotonic() > deadline:
                raise BroadcastError(f"not done after {timeout_s:g} s")
            time.sleep(POLL_INTERVAL_S)
        try:
            work.wait()
        except RuntimeError as error:
            raise BroadcastError(_first_line(error)) from None

    def close(self) -> None:
        """Leave the group, also during a broadcast."""
        self._group.abort()


def invitation(
    towards: str, sender: str, size: int, device: torch.device, backend: Literal["nccl", "gloo"]
) -> tuple[JoinBroadcast, socket.socket]:
    """Return the sender's JoinBroadcast (rank 0) and the socket that `BroadcastGroup` needs.

    towards: host:port of one of the workers. The sender listens on the address that leads there.
    """
    listener = socket.create_server((own_host(towards), 0))
    host, port = listener.getsockname()[:2]
    join = JoinBroadcast(
        name=uuid.uuid4().hex,
        sender=sender,
        host=host,
        port=port,
        rank=0,
        size=size,
        backend=backend,
        device=str(device),
    )
    return join, listener


def own_host(towards: str) -> str:
    """Return the address of this machine on the route to `towards` (host:port)."""
    host, _, port = towards.rpartition(":")
    family, kind, proto, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(target)  # a datagram socket sends nothing here
        return str(probe.getsockname()[0])


def _make(store: Any, join: JoinBroadcast, own_host: str, timeout: timedelta) -> Any:
    if join.backend == "gloo":
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_host)]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, join.rank, join.size, options)
    # By default torch ends the process when an NCCL peer dies. Here the run continues without the
    # peer. torch reads the variable while it makes a group.
    kept = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=1)  # `finish` has a shorter timeout
        group = dist.ProcessGroupNCCL(store, join.rank, join.size, options)
        device = torch.device(join.device)
        # NCCL waits without end for a peer that dies between the store and its first message.
        _within(JOIN_TIMEOUT_S, lambda: group.eager_connect_single_device(device))
        return group
    finally:
        del os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
        if kept is not None:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = kept


def _within(seconds: float, connect: Callable[[], None]) -> None:
    """Call `connect`, in a thread that is left behind if it takes longer.

    Raises BroadcastError then, and what `connect` raises.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            connect()
        except RuntimeError as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="join broadcast", daemon=True).start()
    try:
        done.result(seconds)
    except TimeoutError:
        raise BroadcastError(f"not connected after {seconds:g} s") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
