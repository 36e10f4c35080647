"""Files of a run directory that survive a crash, a resume and a full disk.

Rows are JSON lines appended one write at a time; a torn last line (killed while writing) is never
read. Whole files appear by rename. Nothing here knows what the rows mean, except `phase`, `during`
and `step`, by which a resumed run takes back what it will write again.
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
    """Turn "no space left" into a UserError; whatever was written before stays as it is."""
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
    """Replace `path` in one step: a reader sees the old content or the new, never a half."""
    temporary = path.with_name(path.name + ".tmp")
    with full_disk_named(path):
        temporary.write_text(content)
        os.replace(temporary, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, oldest first; none when it does not exist."""
    return [json.loads(line) for line in _whole_lines(path)]


def kept_rows(path: Path, total: int, noun: str) -> str:
    """Return the sentence of a stopped program whose rows lie in `path`, one for each `noun`."""
    rows = len(_whole_lines(path))
    if not rows:
        return "Nothing was answered yet; the same command begins again."
    return f"{path} keeps {rows} of {counted(total, noun)}; the same command goes on."


def write_error(out_dir: Path, sentence: str) -> None:
    """Keep the sentence that ended a run in OUT/error.txt, unless one is there.

    "" removes it when a run starts.
    """
    path = out_dir / "error.txt"
    if not sentence:
        path.unlink(missing_ok=True)
    elif out_dir.is_dir():
        with suppress(FileExistsError), full_disk_named(path), path.open("x") as file:
            file.write(sentence + "\n")


@contextmanager
def error_kept(out_dir: Path, rank: int) -> Iterator[None]:
    """Keep in OUT/error.txt the first error that ends the run, and remove that of an earlier one.

    Every rank enters it: an error may be one rank's own, and the others then fail for their lost
    connection, which is not kept. A run that was asked to stop has no error, and a start that was
    refused since another process owns the directory leaves that one's file alone. All ranks see
    `out_dir`.
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
    """Return the sentence that ended the run; "" if it keeps none."""
    path = out_dir / "error.txt"
    return path.read_text().strip() if path.is_file() else ""


class RowFile:
    """Appends JSON rows. Unbuffered: a row has left the process when `append` returns."""

    def __init__(self, path: Path, resume: tuple[str, int] | None) -> None:
        """Keep the rows before step `resume[1]` of phase `resume[0]`; without it start empty."""
        kept = list(_rows_before(path, *resume)) if resume else []
        if path.is_file():
            write_file(path, "".join(line + "\n" for line in kept))
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def append(self, row: dict[str, Any]) -> None:
        left = memoryview((json.dumps(row, allow_nan=False) + "\n").encode())
        with full_disk_named(self._path):
            while left:
                left = left[self._file.write(left) :]

    def close(self) -> None:
        self._file.close()


def _rows_before(path: Path, phase: str, step: int) -> Iterator[str]:
    """Lines up to the first of `phase` at or after `step`. Rows lie in the order of time, so all
    that follow it, evaluations and later phases too, were made from weights that are gone."""
    for line in _whole_lines(path):
        row = json.loads(line)
        if row.get("during", row["phase"]) == phase and row["step"] >= step:
            return
        yield line


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    *whole, _torn = path.read_text().split("\n")
    return whole
