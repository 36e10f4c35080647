"""Handling of SIGINT, SIGTERM, SIGHUP and SIGUSR1 in a training process.

SIGUSR1, which schedulers send some time before a job's time limit, asks the run to stop after the
current step, or after the current batch of an evaluation. SIGINT, SIGTERM and SIGHUP are called
interrupts. Before the first step or evaluation an interrupt ends the process at once. Later the
first interrupt acts like SIGUSR1, and the second one ends the process at once.
`trainer/preemption.py` makes the ranks agree on stopping.

The signals are blocked, and a thread receives them, since a signal handler would have to wait for
the code that runs in the main thread. Child processes (decoders, checkpoint writers, wandb) inherit
the block; otherwise a signal that a terminal or Slurm sends to all processes would end them.

Under launch/torchrun.py the launcher counts interrupts and ends the ranks. A SIGTERM from the
launcher means that another rank has failed and has printed the error.
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
HANDLED = INTERRUPTS | {signal.SIGUSR1}
SAME_S = 0.3  # two interrupts within this time count as one: some schedulers send each twice
END_ALL = signal.SIGUSR2  # a rank sends it to its launcher, which then ends all ranks
_POLL_INTERVAL_S = 1.0


@dataclass(slots=True)
class _State:
    stop_requested: bool = False
    steps_begun: bool = False
    interrupted_s: float = 0.0  # monotonic time of the first interrupt; 0: none yet


_state = _State()


def take_signals() -> None:
    """Block the signals and start the thread that receives them.

    Call this function before other threads start, since they inherit the signal mask.
    """
    handled = {number for number in HANDLED if signal.getsignal(number) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    resource_tracker.ensure_running()  # starting it unblocks SIGINT and SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    for number in handled:  # used only if a library unblocks a signal
        signal.signal(number, lambda number, _: _handle(signal.Signals(number), sender=0))
    threading.Thread(target=_receive_signals, args=(handled,), daemon=True).start()
    Finalize(None, _kill_daemonic_children, exitpriority=0)


def _kill_daemonic_children() -> None:
    """End daemonic children when this process ends.

    At exit multiprocessing sends them SIGTERM, which they block, and would wait for them forever.
    """
    for child in active_children():
        if child.daemon:
            child.kill()


def begin_steps() -> None:
    """Make later interrupts wait for the end of the step, or of the batch of an evaluation."""
    _state.steps_begun = True


def stop_asked() -> bool:
    """Return whether a signal has asked the run to stop."""
    return _state.stop_requested


def _receive_signals(handled: set[signal.Signals]) -> None:
    while True:
        received = signal.sigtimedwait(handled, _POLL_INTERVAL_S)
        if parent_is_gone():
            os._exit(128 + signal.SIGKILL)
        if received is None:
            continue
        _handle(signal.Signals(received.si_signo), received.si_pid)


def _handle(number: signal.Signals, sender: int) -> None:
    """Request the stop; an interrupt may also end the process. `sender` is a process id."""
    if number in INTERRUPTS:
        _interrupt(number, sender)
    _state.stop_requested = True


def _interrupt(number: signal.Signals, sender: int) -> None:
    under_launcher = PARENT in os.environ
    ended = sender == launcher() or a_rank_has_failed()
    if under_launcher and number == signal.SIGTERM and ended:
        os._exit(128 + number)  # the launcher or the failed rank prints the error
    now = time.monotonic()
    again = _state.interrupted_s and now - _state.interrupted_s > SAME_S
    _state.interrupted_s = _state.interrupted_s or now
    if not _state.steps_begun:
        _print_once_per_node("Interrupted before the first step: nothing was trained.")
        _end(number)
    elif again and not under_launcher:
        _print_once_per_node("Ended at once; the same command goes on from the newest checkpoint.")
        _end(number)
    elif sys.stderr.isatty():
        _print_once_per_node(
            "The run stops after this step, or this batch of an evaluation, and saves; a second "
            "Ctrl-C ends it at once."
        )


def _end(number: signal.Signals) -> NoReturn:
    if PARENT in os.environ:
        os.kill(launcher(), END_ALL)
        time.sleep(30)  # the launcher ends this process; if it is gone, the kernel does
    os._exit(128 + number)


def _print_once_per_node(sentence: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        newline = "\n" if sys.stderr.isatty() else ""  # below a progress bar
        os.write(2, f"{newline}{sentence}\n".encode())
