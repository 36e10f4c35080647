"""Progress on stderr: lines always, bars only on a terminal."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line on stderr without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def say_written(path: Path) -> None:
    """Say where a command has left a file, or the folder of several; the last line of a tool."""
    say(f"Written: {path}")


def say_engine_starts(checkpoint: str) -> None:
    """Say that the rollout engine starts, which blocks the program for a while."""
    say(f"Starting vLLM for {checkpoint}: usually 20 to 60 s, minutes for a large model.")


def progress_bar(
    what: str, total: int, unit: str, done: int = 0, *, disable: bool | None = None
) -> "tqdm[Any]":
    """Return a bar over `total` units, `done` of which were there before.

    `disable` None shows it on a terminal alone.
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
