"""How every program ends: a mistake is one sentence and exit code 2, Ctrl-C one line and 130."""

import argparse
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_vrl.errors import EXIT_CODE, UserError

LEAVE_S = 5.0
_OPTION = re.compile(r"--\w+\.[\w.]+(=.*)?")  # a key of the configuration, written like an option


class OverrideParser(argparse.ArgumentParser):
    """Argument parser that answers `--grpo.steps 5` with the right form, `grpo.steps=5`."""

    def error(self, message: str) -> NoReturn:
        words = sys.argv[1:]
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if _OPTION.fullmatch(word):
                key, _, value = word.removeprefix("--").partition("=")
                value = value or ("VALUE" if following.startswith("-") else following or "VALUE")
                self.exit(EXIT_CODE, f"error: {word} is not an option: write {key}={value}.\n")
        super().error(message)


def protocol_name(text: str) -> str:
    """Return the name of a scoring protocol; `seed`, its earlier name, becomes `temporal_r1`.

    For options of tools, which accept the earlier name and print the new one to stderr.
    """
    if text != "seed":
        return text
    print("note: `seed` is now called `temporal_r1`.", file=sys.stderr)
    return "temporal_r1"


def run_program(
    main: Callable[[], int | None], unblocked: frozenset[int] = frozenset({signal.SIGINT})
) -> NoReturn:
    """Exit with the code that `main` returns (None: 0).

    `unblocked` are signals that launch/torchrun.py blocks until a rank is ready for them.

    A UserError is printed by the first rank of a node that raises one. A reader that closes stdout
    early has seen enough; that is no mistake. Nothing that libraries say follows the line
    of an interrupted process, which ends within LEAVE_S.
    """
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, unblocked)
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if _is_first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what is left
        if _is_first_to_fail():
            newline = "\n" if sys.stderr.isatty() else ""  # below a progress bar
            print(f"{newline}Interrupted.", file=sys.stderr, flush=True)
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
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def a_rank_has_failed() -> bool:
    """Return whether a rank of this node has said why it ends."""
    mark = _failure_mark()
    return mark is not None and mark.exists()


def _failure_mark() -> Path | None:
    """Return the file that marks that a rank has said why it ends; None without torchrun.

    torchrun gives each rank of a start a folder for an error report. The file lies beside them.
    """
    report = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return report.parent.parent / "said" if report.name == "error.json" else None


def _is_first_to_fail() -> bool:
    """Return whether no other rank of this node has said why it ends; mark that this one has."""
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
