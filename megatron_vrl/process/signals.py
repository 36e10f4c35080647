"""Handling of SIGINT, SIGTERM, SIGHUP and SIGUSR1 in a training process.

SIGUSR1, which schedulers send some time before a job's limit, asks the run to stop after the
current step or batch of an evaluation. An interrupt (any other of these signals) does the same once
steps or evaluations have begun, and ends the process at once before that. A second interrupt ends
it at once in any case. `trainer/preemption.py` makes the ranks agree on stopping.

The signals are blocked, and a thread receives them: a handler would have to wait for Python code in
the main thread. Children (decoders, checkpoint writers, wandb) inherit the block; otherwise a
signal that a terminal or Slurm sends to all processes would end them.

Under launch/torchrun.py the launcher counts interrupts and ends the ranks. Its own SIGTERM means
that another rank has failed and has printed the error.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import active_children, resource_tracker
from multiprocessing.util import Finalize
from typing import NoReturn

from megatron_vrl.process.entry import a_rank_has_failed
from megatron_vrl.process.parent_death import PARENT, launcher, parent_is_gone

INTERRUPTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
TAKEN = INTERRUPTS | {signal.SIGUSR1}
SAME_S = 0.3  # `timeout` and some schedulers send one interrupt twice
END_ALL = signal.SIGUSR2  # from a rank to its launcher
_TICK_S = 1.0


@dataclass(slots=True)
class _State:
    asked: bool = False
    steps_begun: bool = False
    interrupted_s: float = 0.0  # when, by the monotonic clock; 0: never


_state = _State()


def take_signals() -> None:
    """Block the signals and start the thread. Call it early: later threads inherit the mask."""
    taken = {number for number in TAKEN if signal.getsignal(number) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    resource_tracker.ensure_running()  # which unblocks SIGINT and SIGTERM once it has started
    signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    for number in taken:  # should a library unblock one
        signal.signal(number, lambda number, _: _heed(signal.Signals(number), sender=0))
    threading.Thread(target=_take, args=(taken,), daemon=True).start()
    Finalize(None, _kill_helpers, exitpriority=0)


def _kill_helpers() -> None:
    """End daemonic children when this process ends.

    multiprocessing would send them SIGTERM, which they block, and wait for ever.
    """
    for child in active_children():
        if child.daemon:
            child.kill()


def begin_steps() -> None:
    """Make later interrupts wait for the end of the step, or of the batch of an evaluation."""
    _state.steps_begun = True


def stop_asked() -> bool:
    return _state.asked


def _take(taken: set[signal.Signals]) -> None:
    while True:
        received = signal.sigtimedwait(taken, _TICK_S)
        if parent_is_gone():
            os._exit(128 + signal.SIGKILL)
        if received is None:
            continue
        _heed(signal.Signals(received.si_signo), received.si_pid)


def _heed(number: signal.Signals, sender: int) -> None:
    if number in INTERRUPTS:
        _interrupt(number, sender)
    _state.asked = True


def _interrupt(number: signal.Signals, sender: int) -> None:
    under_launcher = PARENT in os.environ
    ended = sender == launcher() or a_rank_has_failed()
    if under_launcher and number == signal.SIGTERM and ended:
        os._exit(128 + number)  # the launcher says why, or the rank that failed has
    now = time.monotonic()
    again = _state.interrupted_s and now - _state.interrupted_s > SAME_S
    _state.interrupted_s = _state.interrupted_s or now
    if not _state.steps_begun:
        _say("Interrupted before the first step: nothing was trained.")
        _end(number)
    elif again and not under_launcher:
        _say("Ended at once; the same command goes on from the newest checkpoint.")
        _end(number)
    elif sys.stderr.isatty():
        _say(
            "The run saves and stops after this step, or this batch of an evaluation; a second "
            "Ctrl-C ends it at once."
        )


def _end(number: signal.Signals) -> NoReturn:
    if PARENT in os.environ:
        os.kill(launcher(), END_ALL)
        time.sleep(30)  # the launcher ends this process; without it the kernel does
    os._exit(128 + number)


def _say(sentence: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        newline = "\n" if sys.stderr.isatty() else ""  # below a progress bar
        os.write(2, f"{newline}{sentence}\n".encode())
