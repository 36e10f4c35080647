"""Lock of a run directory, or of a tool's output folder: one process group at a time.

OUT/lock/rank0 is locked by rank 0 and OUT/lock/ranks by the other ranks, with flock(2), which the
kernel releases when the process and the checkpoint writers that it forked have ended. A new run
waits for both. flock may not reach other hosts, so rank 0 also writes a lease
(OUT/lock/holder.json) and increments its `beat`. A new run on another host takes the directory when
the lease has not changed for SILENT_S seconds; clocks of hosts are never compared. A holder whose
lease was replaced stops at its next step.

A directory is free (no lease), held (lock or changing lease), stale (a lease that stands still), or
lost (another host has replaced the lease). Example: host A is switched off at beat 41; host B sees
beat 41 for 30 s and takes the directory.

A tool holds its --out folder by `owned`, one process without ranks.

Not covered: two hosts that start within one beat on a file system without flock. The one that wrote
first stops after a beat.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError, RunInUse, UserError
from megatron_vrl.storage.files import write_file

BEAT_S = 5.0
SILENT_S = 6 * BEAT_S
TOOL_WAITS_S = 3.0  # for the processes of an ended call, which hold the lock until they are gone
_LOOK_S = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(slots=True)
class _State:
    lost: bool = False  # to a run on another host


_state = _State()


def ownership_lost() -> bool:
    return _state.lost


class Owner:
    """Hold of one rank on a run directory, until its process ends."""

    def __init__(
        self,
        out_dir: str | Path,
        rank: int,
        timeout_s: float,
        *,
        folder: str = "lock",
        user: str = "run",
        advice: str = "",
    ) -> None:
        """Take the directory (rank 0); wait at most `timeout_s` seconds, then raise RunInUse.

        If the locks are free and a lease of another host exists, the wait is at least SILENT_S,
        since that host may be gone. The other ranks call `join` when rank 0 has returned. The files
        are in `out_dir`/`folder`; `user` and `advice` are part of the error sentence.
        """
        self._out_dir, self._rank, self._user = Path(out_dir), rank, user
        self._timeout_s = timeout_s
        self._advice = advice or (
            "stop that run, choose another run.out_dir, or wait longer with run.lock_timeout_s="
            f"{2 * timeout_s + 60:g}."
        )
        self._folder = self._out_dir / folder
        self._holder = self._folder / "holder.json"
        self._files: list[int] = []
        self._ended = threading.Event()
        self._beats: threading.Thread | None = None
        if rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._begin_lease()

    def join(self) -> None:
        """Take the lock of the other ranks. Call it after rank 0's constructor has returned."""
        if self._rank != 0:
            self._files.append(self._open("ranks"))
            _locked(self._files[0], fcntl.LOCK_SH)

    def release(self) -> None:
        """Remove the lease, so that a run on another host need not wait. The locks stay held."""
        self._ended.set()
        if self._beats is not None:
            self._beats.join()  # so that it does not write the lease again
        if self._rank == 0 and not _state.lost:
            self._holder.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lease and the locks of this process."""
        self.release()
        for file in self._files:
            os.close(file)
        self._files.clear()

    def _acquire(self) -> None:
        lock, ranks = self._open("rank0"), self._open("ranks")
        reaches = _has_locks(lock)  # all processes of this kernel
        silence = _Silence()
        began = time.monotonic()
        announced = False
        while True:
            free = _locked(lock, fcntl.LOCK_EX) and _locked(ranks, fcntl.LOCK_EX)
            holder = _read(self._holder)
            ended = holder is None or (reaches and holder["boot"] == _boot())
            if free and (ended or silence.of(holder) > SILENT_S):
                break
            patience_s = max(self._timeout_s, SILENT_S + BEAT_S) if free else self._timeout_s
            in_use = f"{self._out_dir} is in use by another {self._user} ({_named(holder)})"
            if time.monotonic() - began > patience_s:
                os.close(lock)
                os.close(ranks)
                raise RunInUse(f"{in_use}: {self._advice}")
            if not announced and time.monotonic() - began > 1:
                announced = True
                print(f"{in_use}; waiting up to {patience_s:g} s for its end.", file=sys.stderr)
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
        self._beats = threading.Thread(target=self._beat, args=(lease,), daemon=True)
        self._beats.start()

    def _beat(self, lease: dict[str, Any]) -> None:
        while not self._ended.wait(BEAT_S):
            if (_read(self._holder) or lease)["token"] not in (lease["token"], "unknown"):
                _state.lost = True
                return
            lease["beat"] += 1
            with suppress(OSError, UserError):  # a full disk: the run itself meets and names it
                write_file(self._holder, json.dumps(lease))


@contextmanager
def owned(out: Path, folder: str = "lock") -> Iterator[None]:
    """Hold the --out folder of a tool, so that no second call mixes its rows with these.

    Raises RunInUse if another call holds it. `folder` in `out` has the lock: calls that write other
    files of `out` have another one.
    """
    advice = "wait for its end, or choose another --out."
    try:
        owner = Owner(out, 0, TOOL_WAITS_S, folder=folder, user="call", advice=advice)
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written ({error.strerror}): choose another folder."
        ) from None
    try:
        yield
    finally:
        owner.close()


def check_owned(out: Path) -> None:
    """Raise RunInUse if a call on another host has taken the folder that this process held."""
    if _state.lost:
        raise RunInUse(
            f"{out} was taken by a call on another host, since this one showed no sign of life for "
            "some time: wait for its end, or choose another --out."
        )


@dataclass(frozen=True, slots=True)
class Held:
    """Holder of a directory, as another process sees it."""

    now: bool
    holder: str = ""  # host, process and start; "" after a regular end


def held(out_dir: Path) -> Held | None:
    """Return whether a process holds a run directory; None if it has no lock.

    The lease of another host is watched for up to 2 beats.
    """
    lock, path = out_dir / "lock" / "rank0", out_dir / "lock" / "holder.json"
    if not lock.is_file():
        return None
    file = os.open(lock, os.O_RDONLY)
    try:
        reaches = _has_locks(file)
        free = _locked(file, fcntl.LOCK_SH)
    finally:
        os.close(file)
    holder = _read(path)
    holder_name = _named(holder) if holder else ""
    if not free:
        return Held(True, holder_name)
    if holder is None or (reaches and holder["boot"] == _boot()):
        return Held(False, holder_name)
    until_s = time.monotonic() + 2 * BEAT_S
    while time.monotonic() < until_s:
        time.sleep(_LOOK_S)
        if _read(path) not in (holder, None):
            return Held(True, holder_name)
    return Held(False, holder_name)


class _Silence:
    """Stopwatch of a lease that does not change, by this process's clock."""

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
        lease: dict[str, Any] = json.loads(path.read_text())
        return lease
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # being replaced, on a file system where that takes two steps
        return dict.fromkeys(("token", "host", "boot", "pid", "since"), "unknown")


def _boot() -> str:
    """Return the boot id of the kernel, whose containers share its locks."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _named(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "which is just starting or ending"
    return f"host {holder['host']}, process {holder['pid']}, since {holder['since']}"
