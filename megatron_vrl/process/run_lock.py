"""One run at a time in a run directory: a lock that ends with its holder, and a lease beside it.

OUT/lock/rank0 is locked by rank 0 and OUT/lock/ranks by the other ranks, with flock(2), which the
kernel releases when the process and the checkpoint writers that it forked have ended. A new run
waits for both. flock may not reach other hosts, so rank 0 also writes OUT/lock/holder.json and
counts up its `beat`. A new run on another host takes the directory when the file has not changed
for SILENT_S; clocks of hosts are never compared. A holder whose file was replaced stops at its next
step.

Left out: a file system without flock on which two hosts start within one beat; the one that wrote
first then stops after a beat.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vrl.errors import RunInUse, UserError
from megatron_vrl.storage.files import write_file

BEAT_S = 5.0
SILENT_S = 6 * BEAT_S
_LOOK_S = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(slots=True)
class _State:
    lost: bool = False  # to a run on another host


_state = _State()


def ownership_lost() -> bool:
    return _state.lost


class Owner:
    """A rank's hold of a run directory, for the life of its process."""

    def __init__(self, out_dir: str | Path, rank: int, timeout_s: float) -> None:
        """Rank 0 waits at most `timeout_s` seconds for an earlier run to end, then raises RunInUse.

        The other ranks call `join` when rank 0 has returned.
        """
        self._out_dir, self._rank = Path(out_dir), rank
        self._folder = self._out_dir / "lock"
        self._holder = self._folder / "holder.json"
        self._files: list[int] = []
        self._ended = threading.Event()
        if rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._acquire(timeout_s)
            self._begin_lease()

    def join(self) -> None:
        """Rank 0 has returned from its constructor."""
        if self._rank != 0:
            self._files.append(self._open("ranks"))
            _locked(self._files[0], fcntl.LOCK_SH)

    def release(self) -> None:
        """Spare the next run on another host the wait. The locks stay until the process ends."""
        self._ended.set()
        if self._rank == 0 and not _state.lost:
            self._holder.unlink(missing_ok=True)

    def _acquire(self, timeout_s: float) -> None:
        lock, ranks = self._open("rank0"), self._open("ranks")
        reaches = _has_locks(lock)  # all processes of this kernel
        silence = _Silence()
        began = time.monotonic()
        told = False
        while True:
            free = _locked(lock, fcntl.LOCK_EX) and _locked(ranks, fcntl.LOCK_EX)
            holder = _read(self._holder)
            ended = holder is None or (reaches and holder["boot"] == _boot())
            if free and (ended or silence.of(holder) > SILENT_S):
                break
            if time.monotonic() - began > timeout_s:
                os.close(lock)
                os.close(ranks)
                raise RunInUse(
                    f"{self._out_dir} is in use by another run ({_named(holder)}): stop that run, "
                    "choose another run.out_dir, or wait longer with run.lock_timeout_s="
                    f"{2 * timeout_s + 60:g}."
                )
            if not told and time.monotonic() - began > 1:
                told = True
                print(
                    f"{self._out_dir} is in use by another run ({_named(holder)}); waiting up to "
                    f"{timeout_s:g} s for its end.",
                    file=sys.stderr,
                )
            time.sleep(_LOOK_S)
        os.close(ranks)  # which unlocks it for the ranks of this run
        self._files.append(lock)

    def _open(self, name: str) -> int:
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by exec

    def _begin_lease(self) -> None:
        lease = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "beat": 0,
        }
        write_file(self._holder, json.dumps(lease))
        threading.Thread(target=self._beat, args=(lease,), daemon=True).start()

    def _beat(self, lease: dict[str, Any]) -> None:
        while not self._ended.wait(BEAT_S):
            if (_read(self._holder) or lease)["token"] not in (lease["token"], "unknown"):
                _state.lost = True
                return
            lease["beat"] += 1
            with suppress(OSError, UserError):  # a full disk: the run itself meets and names it
                write_file(self._holder, json.dumps(lease))


class _Silence:
    """Seconds for which a lease has not changed, by this process's clock."""

    def __init__(self) -> None:
        self._seen: Any = None
        self._since_s = time.monotonic()

    def of(self, holder: dict[str, Any] | None) -> float:
        if holder != self._seen:
            self._seen, self._since_s = holder, time.monotonic()
        return time.monotonic() - self._since_s


def _locked(file: int, kind: int) -> bool:
    """Take the lock; return False if another process holds it, True if there is no flock."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _has_locks(file: int) -> bool:
    """Return whether the file system supports flock."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Return the lease: None if there is none, "unknown" fields if it cannot be read now."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # being replaced, on a file system where that takes two steps
        return dict.fromkeys(("token", "host", "boot", "pid", "since"), "unknown")


def _boot() -> str:
    """One name for all containers on a kernel, which share its locks."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _named(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "which is just starting or ending"
    return f"host {holder['host']}, process {holder['pid']}, since {holder['since']}"
