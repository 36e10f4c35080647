"""How every program ends: a mistake is one sentence and exit code 2."""

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_vrl.errors import EXIT_CODE, UserError


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the code that `main` returns (None: 0).

    A UserError is printed by the first rank alone. A reader that closes stdout early has seen
    enough; that is no mistake.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        code = EXIT_CODE
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
