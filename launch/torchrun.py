"""torchrun whose user errors stay one sentence and whose interrupts reach all ranks.

Arguments and behaviour are those of torchrun, except for signals and errors:

- A rank that fails has already printed a sentence or a traceback. One line that names the first
  rank that failed replaces torchrun's own report, a traceback of the launcher.
- torchrun gives ranks sessions of their own, so Ctrl-C reaches this process alone. It forwards the
  first SIGINT, SIGTERM or SIGHUP to the ranks, which finish the step and save. A second signal, or
  one before the first step, ends all ranks at once.
- It forwards SIGUSR1 to the ranks: finish the step and stop.
- Ranks end with this process (megatron_vrl/process/parent_death.py), and this process ends with
  the one that MEGATRON_VRL_PARENT names.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import psutil

from megatron_vrl.errors import EXIT_CODE
from megatron_vrl.process.parent_death import PARENT, end_with_parent
from megatron_vrl.process.signals import END_ALL, INTERRUPTS, SAME_S


@dataclass(slots=True)
class _Interrupted:
    number: int = 0  # of the first signal
    at_s: float = 0.0  # by the monotonic clock


_first = _Interrupted()


def run() -> int:
    if PARENT in os.environ:
        end_with_parent()
    os.environ[PARENT] = str(os.getpid())  # the ranks'
    for number in INTERRUPTS:
        ignored = signal.getsignal(number) == signal.SIG_IGN  # as nohup leaves SIGHUP
        # a function, which ranks do not inherit: they receive the forwarded signals
        signal.signal(number, (lambda *_: None) if ignored else _interrupt)
    signal.signal(signal.SIGUSR1, lambda number, _: _forward(number))
    signal.signal(END_ALL, lambda *_: _end_all())
    _block_for_ranks()
    return _launch()


def _block_for_ranks() -> None:
    """Block the forwarded signals in the ranks until the ranks are ready to receive them.

    This process still receives them, in a thread that does not block them.
    """
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})


def _launch() -> int:
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(["--signals-to-handle", "SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == EXIT_CODE:
            return EXIT_CODE
        if _first.number and code == 128 + signal.SIGINT:  # the rank has printed so
            return 128 + _first.number
        how = (
            f"was killed by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
        )
        _say(f"Rank {rank} (process {failure.pid}) {how}, and all ranks of this node with it.")
        return 1
    return 0


def _interrupt(number: int, _: FrameType | None) -> None:
    now = time.monotonic()
    if _first.number:
        if now - _first.at_s > SAME_S:
            _say("Ended at once; the same command goes on from the newest checkpoint.")
            _end_all()
        return
    _first.number, _first.at_s = number, now
    if not _ranks():
        _say("Interrupted before the first step: nothing was trained.")
        _end_all()
    _forward(signal.SIGINT)  # SIGTERM is what torchrun ends ranks with when one has failed


def _forward(number: int) -> None:
    for rank in _ranks():
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(rank, number)


def _end_all() -> NoReturn:
    for rank in _ranks():
        with suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)
    os._exit(128 + (_first.number or signal.SIGINT))


def _ranks() -> list[int]:
    """Return the process ids of the ranks: children of this process that lead sessions."""
    return [child.pid for child in psutil.Process().children() if _leads(child.pid)]


def _leads(child: int) -> bool:
    try:
        return os.getsid(child) == child
    except ProcessLookupError:
        return False


def _say(sentence: str) -> None:
    newline = "\n" if sys.stderr.isatty() else ""  # below a progress bar
    os.write(2, f"{newline}{sentence}\n".encode())


if __name__ == "__main__":
    sys.exit(run())
