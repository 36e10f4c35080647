"""Entry point of every program: a user's error is one sentence and exit code 2, Ctrl-C code 130."""

import atexit
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megatron_vrl.errors import EXIT_CODE, UserError

LEAVE_S = 5.0


def protocol_name(text: str) -> str:
    """Return the name of a scoring protocol; `seed`, its earlier name, becomes `temporal_r1`.

    For options of tools, which accept the earlier name and print the new one to stderr.
    """
    if text != "seed":
        return text
    print("note: `seed` is now called `temporal_r1`.", file=sys.stderr)
    return "temporal_r1"


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C with a sentence that is printed after "Interrupted."."""


@contextmanager
def told_if_interrupted(sentence: Callable[[], str]) -> Iterator[None]:
    """Print `sentence()` after "Interrupted." if Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        raise _Interrupted(f" {sentence()}") from None


def run_program(
    main: Callable[[], int | None], unblocked: frozenset[int] = frozenset({signal.SIGINT})
) -> NoReturn:
    """Run `main` and exit with the code that it returns (None: 0).

    `unblocked` names signals that launch/torchrun.py blocks until a rank is ready for them.

    The first rank of a node that raises a UserError prints it, and the code is 2. If the reader of
    stdout closes it early (`| head`), the code is 0. An interrupted process prints one line, drops
    what libraries print after it, and ends within LEAVE_S seconds.
    """
    codes = _leave_without_destructors() if main.__module__ == "__main__" else []
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, unblocked)
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if _is_first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what is left
        if _is_first_to_fail():
            newline = "\n" if sys.stderr.isatty() else ""  # below a progress bar
            more = str(interrupt) if isinstance(interrupt, _Interrupted) else ""
            print(f"{newline}Interrupted.{more}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        code = 128 + signal.SIGINT
        leaving = threading.Timer(LEAVE_S, os._exit, (code,))
        leaving.daemon = True
        leaving.start()
    except BrokenPipeError:
        if not _nobody_reads():  # another pipe, to a process of ours
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    codes.append(code)
    sys.exit(code)


def _leave_without_destructors() -> list[int]:
    """Return a list; after a code is appended, a process with a CUDA context ends by os._exit.

    Memory pools, CUDA graphs and NCCL groups that are alive at the end are destroyed in any order,
    which can end a finished run with code 134 (vLLM's device_allocator/cumem.py). This handler is
    registered first and so runs last, after all that libraries do at exit.
    """
    codes: list[int] = []

    def leave() -> None:
        torch = sys.modules.get("torch")
        if codes and torch is not None and torch.cuda.is_initialized():
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # nobody reads it, or it is closed
                    stream.flush()
            os._exit(codes[0])

    atexit.register(leave)
    return codes


def _nobody_reads() -> bool:
    """Return whether stdout is a pipe without a reader."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def a_rank_has_failed() -> bool:
    """Return whether a rank of this node has printed the error that ends it."""
    mark = _failure_mark()
    return mark is not None and mark.exists()


def _failure_mark() -> Path | None:
    """Return the file that a rank creates before it prints its error; None without torchrun.

    torchrun gives each rank a folder for an error report. The file is beside these folders.
    """
    report = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return report.parent.parent / "failed" if report.name == "error.json" else None


def _is_first_to_fail() -> bool:
    """Return whether this is the first rank of the node to print an error; create the mark."""
    mark = _failure_mark()
    if mark is None:
        return os.environ.get("RANK", "0") == "0"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a launcher without such folders
        return os.environ.get("RANK", "0") == "0"
    return True
