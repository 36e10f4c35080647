"""Files of a run directory that survive a crash, a restart and a full disk.

Row files are JSON lines; each append is one write. A torn last line (process killed while writing)
is never read. Whole files are written beside their name and renamed. The only row fields
interpreted here are `phase`, `during` and `step`: on resume, rows that the run will write again are
removed.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_vrl.errors import RunInUse, StopRequested, UserError, counted
from megatron_vrl.process.entry import a_rank_has_failed


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn "no space left" into a UserError that names the file. Earlier content stays intact."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"The disk is full: {path} cannot grow. Make room and start the same command again; "
            "it goes on from the last checkpoint."
        ) from None


def write_file(path: Path, content: str) -> None:
    """Replace the file atomically: a reader sees the old content or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    with full_disk_named(path):
        temporary.write_text(content)
        os.replace(temporary, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, oldest first; [] if it does not exist."""
    return [json.loads(line) for line in _whole_lines(path)]


def kept_rows(path: Path, total: int, noun: str) -> str:
    """Return a sentence on the progress of a stopped program: rows in `path` out of `total`."""
    rows = len(_whole_lines(path))
    if not rows:
        return "Nothing was answered yet; the same command begins again."
    return f"{path} keeps {rows} of {counted(total, noun)}; the same command goes on."


def write_error(out_dir: Path, sentence: str) -> None:
    """Write the sentence that ended a run to OUT/error.txt, unless the file exists.

    An empty sentence removes the file; used when a run starts.
    """
    path = out_dir / "error.txt"
    if not sentence:
        path.unlink(missing_ok=True)
    elif out_dir.is_dir():
        with suppress(FileExistsError), full_disk_named(path), path.open("x") as file:
            file.write(sentence + "\n")


@contextmanager
def recorded_error(out_dir: Path, rank: int) -> Iterator[None]:
    """Write the first error that ends the run to OUT/error.txt.

    The error of an earlier run is removed first. Every rank enters this context, because an error
    may occur on one rank only. The other ranks then fail with a lost connection, which is not
    written. Nothing is written if the run was asked to stop, or if it did not start because another
    process owns the directory. All ranks must see `out_dir`.
    """
    if rank == 0:
        write_error(out_dir, "")
    try:
        yield
    except (StopRequested, RunInUse):
        raise
    except Exception as error:
        known = isinstance(error, UserError)
        if not a_rank_has_failed():
            write_error(out_dir, str(error) if known else f"{type(error).__name__}: {error}")
        raise


def read_error(out_dir: Path) -> str:
    """Return the sentence that ended the run; "" if there is none."""
    path = out_dir / "error.txt"
    return path.read_text().strip() if path.is_file() else ""


class RowFile:
    """Appends JSON rows, unbuffered: when `append` returns, the operating system has the row."""

    def __init__(self, path: Path, resume: tuple[str, int] | None) -> None:
        """Keep the rows before `resume`, a (phase, step). None starts an empty file."""
        kept = list(_rows_before(path, *resume)) if resume else []
        if path.is_file():
            write_file(path, "".join(line + "\n" for line in kept))
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def append(self, row: dict[str, Any]) -> None:
        """Append one row as a JSON line. Raises UserError if the disk is full."""
        left = memoryview((json.dumps(row, allow_nan=False) + "\n").encode())
        with full_disk_named(self._path):
            while left:
                left = left[self._file.write(left) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _rows_before(path: Path, phase: str, step: int) -> Iterator[str]:
    """Yield the lines before the first one of `phase` with a step of at least `step`.

    Rows are in order of time. All rows after that line, also those of evaluations and later phases,
    describe weights that are lost.
    """
    for line in _whole_lines(path):
        row = json.loads(line)
        if row.get("during", row["phase"]) == phase and row["step"] >= step:
            return
        yield line


def _whole_lines(path: Path) -> list[str]:
    """Return the complete lines of a file, without a torn last line."""
    if not path.is_file():
        return []
    *whole, _torn = path.read_text().split("\n")
    return whole
