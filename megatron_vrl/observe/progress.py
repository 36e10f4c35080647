"""Progress output on stderr: plain lines, and bars if stderr is a terminal."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


def log_line(line: str) -> None:
    """Print a line on stderr without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def log_written(path: Path) -> None:
    """Print the path of an output file or folder; the last line of a command."""
    log_line(f"Written: {path}")


def log_engine_start(checkpoint: str) -> None:
    """Print that the rollout engine starts, which blocks the program for a while."""
    log_line(f"Starting vLLM for {checkpoint}: usually 20 to 60 s, minutes for a large model.")


def progress_bar(
    what: str, total: int, unit: str, done: int = 0, *, disable: bool | None = None
) -> "tqdm[Any]":
    """Return a bar over `total` units, of which `done` were completed before.

    `disable` None shows the bar on a terminal only.
    """
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=" " + unit,
        dynamic_ncols=True,
        disable=disable,
        file=sys.stderr,
    )
