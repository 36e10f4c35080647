"""Weights by broadcast: one sender's process group with the workers that share no memory with it.

A group stands apart from torch.distributed's default one, so its members may die, and it is made
anew whenever they are others. NCCL between GPUs, gloo without. Nothing waits in it for ever: both
sides look whether a broadcast is done and give it up when the other end is gone. As in every job
of torch, what goes over it is neither encrypted nor signed; its address is one that its members
use anyway, and its name, which joining it takes, is told to them over HTTP only.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

JOIN_TIMEOUT_S = 30
LOOK_EVERY_S = 0.001


class Broken(Exception):
    """A broadcast that did not come to its end, or a group that was not made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """How a worker comes into a sender's group."""

    name: str
    sender: str  # whose older group this one replaces
    host: str  # of the sender
    port: int
    rank: int
    size: int
    backend: Literal["nccl", "gloo"]
    device: str = "cpu"  # of the sender's rank; a worker knows its own


class Group:
    """Rank 0 sends, every other rank receives."""

    def __init__(self, join: Join, own_host: str, listener: socket.socket | None = None) -> None:
        """All ranks call it together; the sender brings the socket on which the others find it.

        Raises Broken if one does not come within JOIN_TIMEOUT_S.
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
            named.set(f"rank {join.rank}", "here")  # NCCL would wait for ever for one who is not
            named.wait([f"rank {rank}" for rank in range(join.size)], timeout)
            self._group = _make(named, join, own_host, timeout)
        except (RuntimeError, OSError) as error:
            raise Broken(_first_line(error)) from None
        self._store = store  # lives as long as the group
        self._how = dist.BroadcastOptions()
        self._how.rootRank = self._how.rootTensor = 0

    def start(self, flat: torch.Tensor) -> Any:
        """Begin to send or to receive these bytes; give what this returns to `finish`."""
        return self._group.broadcast([flat], self._how)

    def finish(self, work: Any, timeout_s: float, lost: Callable[[], bool] = lambda: False) -> None:
        """Wait for it. Raises Broken when the time is over, an end is gone, or `lost` says so."""
        deadline = time.monotonic() + timeout_s
        while not work.is_completed():
            if lost():
                raise Broken("a worker was lost")
            if time.monotonic() > deadline:
                raise Broken(f"not done after {timeout_s:g} s")
            time.sleep(LOOK_EVERY_S)
        try:
            work.wait()
        except RuntimeError as error:
            raise Broken(_first_line(error)) from None

    def close(self) -> None:
        """Also in the midst of a broadcast."""
        self._group.abort()


def invitation(
    towards: str, sender: str, size: int, device: torch.device, backend: Literal["nccl", "gloo"]
) -> tuple[Join, socket.socket]:
    """The sender's own place in a new group, and the socket that `Group` wants.

    `towards`: host:port of one of the others; the sender listens where that one can reach it.
    """
    listener = socket.create_server((own_host(towards), 0))
    host, port = listener.getsockname()[:2]
    join = Join(
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
    """The address of this machine from which `towards` (host:port) is reached."""
    host, _, port = towards.rpartition(":")
    family, kind, proto, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(where)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def _make(store: Any, join: Join, own_host: str, timeout: timedelta) -> Any:
    if join.backend == "gloo":
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_host)]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, join.rank, join.size, options)
    # By default torch ends the process when an NCCL peer dies; here the run goes on without it.
    # It reads this while it makes a group.
    kept = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=1)  # `finish` has a shorter one
        group = dist.ProcessGroupNCCL(store, join.rank, join.size, options)
        group.eager_connect_single_device(torch.device(join.device))
        return group
    finally:
        del os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
        if kept is not None:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = kept


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
