"""Broadcast group: it delivers the bytes, and no rank waits forever."""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_vrl.rollout.workers import broadcast
from megatron_vrl.rollout.workers.broadcast import (
    BroadcastError,
    BroadcastGroup,
    JoinBroadcast,
    invitation,
    own_host,
)

BYTES = torch.arange(100, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "JOIN_TIMEOUT_S", 3)


def invited(size: int) -> tuple[JoinBroadcast, socket.socket]:
    return invitation("127.0.0.1:80", "sender", size, torch.device("cpu"), "gloo")


def receiver(join: JoinBroadcast, does: Callable[[BroadcastGroup], object]) -> threading.Thread:
    """Start a thread that joins and calls `does` with its group."""
    thread = threading.Thread(
        target=lambda: does(BroadcastGroup(join, own_host(f"{join.host}:{join.port}")))
    )
    thread.start()
    return thread


def test_every_worker_receives_the_bytes() -> None:
    join, listener = invited(3)
    got = {}

    def receive(rank: int) -> threading.Thread:
        def does(group: BroadcastGroup) -> None:
            for round_ in range(2):
                flat = torch.zeros_like(BYTES)
                group.finish(group.start(flat), timeout_s=10)
                got[rank, round_] = flat

        return receiver(replace(join, rank=rank), does)

    threads = [receive(1), receive(2)]
    group = BroadcastGroup(join, join.host, listener)
    for round_ in range(2):
        group.finish(group.start(BYTES * (round_ + 1)), timeout_s=10)
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(torch.equal(flat, BYTES * (round_ + 1)) for (_, round_), flat in got.items())
    assert join.host == "127.0.0.1"  # it listens only on the address that leads to the worker


def test_a_missing_worker_fails_the_group() -> None:
    join, listener = invited(2)
    began = time.monotonic()
    with pytest.raises(BroadcastError):
        BroadcastGroup(join, join.host, listener)
    assert time.monotonic() - began < 20


def test_a_broadcast_is_abandoned_when_its_worker_is_lost_or_at_the_timeout() -> None:
    join, listener = invited(2)
    leave = threading.Event()
    thread = receiver(replace(join, rank=1), lambda group: leave.wait())
    group = BroadcastGroup(join, join.host, listener)
    large = torch.zeros(1 << 26, dtype=torch.uint8)  # more than the sockets buffer
    work = group.start(large)
    with pytest.raises(BroadcastError, match="a worker was lost"):
        group.finish(work, timeout_s=30, lost=lambda: True)
    with pytest.raises(BroadcastError, match=r"not done after 0\.1 s"):
        group.finish(work, timeout_s=0.1)
    leave.set()
    thread.join()
    group.close()


def test_a_connection_that_never_comes_is_given_up() -> None:
    """NCCL's first message waits without end for a peer that has died."""
    forever = threading.Event()

    def connect() -> None:
        forever.wait()

    with pytest.raises(BroadcastError, match=r"not connected after 0\.1 s"):
        broadcast._within(0.1, connect)
    forever.set()
    with pytest.raises(RuntimeError, match="refused"):
        broadcast._within(5, lambda: _refuse())
    broadcast._within(5, lambda: None)


def _refuse() -> None:
    raise RuntimeError("refused")
