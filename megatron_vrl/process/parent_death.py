"""End this process, and what it forks, when the process that started it has gone.

torchrun gives every rank a session of its own, so the ranks of a killed launcher would go on beside
the run that the same command starts next. The kernel kills them instead (PR_SET_PDEATHSIG), which
needs no thread and no signal handler. Programs that helpers execute (wandb, vLLM's own processes)
are not covered: they watch their parent themselves.

Source: prctl(2). The kernel watches the thread that started the child, so children that must
outlive a thread are to be forked by the main one. `prctl` is looked up before any fork: a child of
a process with threads must take no lock (the dynamic loader has one) before the call, or it could
wait for ever and outlive the run with the run's file locks.
"""

import ctypes
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker

PARENT = "MEGATRON_VRL_PARENT"  # process id; set by launch/ for the process that it starts
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def end_with_parent() -> None:
    """Have the kernel kill this process, and its forked children, when its launcher ends.

    A process that was started by hand is not affected: it may outlive its shell.
    """
    expected = launcher()
    if expected:
        _Watched.parent = _opened(expected)
        _ask_kernel()
        if parent_is_gone():  # before the kernel was asked
            os._exit(128 + signal.SIGKILL)
    _Watched.process = os.getpid()
    os.register_at_fork(after_in_child=_end_with_forking_process)


def end_with_starter() -> None:
    """Have the kernel kill this helper process when the process that started it ends."""
    _ask_kernel()


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Start helper processes in the block with SIGINT blocked from their first instruction on.

    The parent decides what an interrupt ends. A helper that got the signal during its imports would
    print a traceback.
    """
    resource_tracker.ensure_running()  # which unblocks SIGINT once it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launcher() -> int:
    """Return the process id of the launcher, ours or a stock torchrun; 0 without one."""
    if PARENT in os.environ:
        return int(os.environ[PARENT])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0


def parent_is_gone() -> bool:
    """Return whether the launcher that `end_with_parent` found has ended."""
    if _Watched.parent is None:
        return False
    watched = select.poll()
    watched.register(_Watched.parent, select.POLLIN)
    return bool(watched.poll(0))


@dataclass(slots=True)
class _State:
    parent: int | None = None  # a pidfd, which no later process can be mistaken for
    process: int = 0


_Watched = _State()


def _opened(process: int) -> int:
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(128 + signal.SIGKILL)


def _ask_kernel() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_forking_process() -> None:
    expected, _Watched.process = _Watched.process, os.getpid()
    _ask_kernel()
    if os.getppid() != expected:
        os._exit(128 + signal.SIGKILL)
