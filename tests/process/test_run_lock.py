"""A run directory has one owner: real processes, and leases as another host would write them."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megatron_vrl.errors import RunInUse
from megatron_vrl.process import run_lock
from megatron_vrl.process.run_lock import Owner
from tests.running import ENVIRONMENT, ROOT, python

HOLDER = """
import os, sys, time
from megatron_vrl.process.run_lock import Owner

rank = int(sys.argv[2])
owner = Owner(sys.argv[1], rank, 0)
owner.join()
if os.fork() == 0:  # as a checkpoint writer is
    time.sleep(float(sys.argv[3]))
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold():
    started = []

    def start(out: Path, rank: int = 0, writes_s: float = 0.0) -> subprocess.Popen:
        process = subprocess.Popen(
            [python(), "-c", HOLDER, str(out), str(rank), str(writes_s)],
            cwd=ROOT,
            env=ENVIRONMENT | {"WARM_SOCKET": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_told_who_holds_it_and_has_it_once_the_holder_is_killed(hold, tmp_path):
    first = hold(tmp_path)
    with pytest.raises(RunInUse, match=rf"in use by another run \(host .*, process {first.pid}, "):
        Owner(tmp_path, 0, 0.3)
    threading.Timer(0.5, os.kill, (first.pid, signal.SIGKILL)).start()
    Owner(tmp_path, 0, 30).release()


def test_any_rank_and_any_writer_keeps_the_directory(hold, tmp_path):
    first = hold(tmp_path)
    other = hold(tmp_path, rank=1, writes_s=2)
    first.kill()
    first.wait()
    with pytest.raises(RunInUse):
        Owner(tmp_path, 0, 0.3)
    other.kill()
    other.wait()
    with pytest.raises(RunInUse):  # its writer still writes
        Owner(tmp_path, 0, 0.1)
    Owner(tmp_path, 0, 30).release()


def lease(out: Path, beat: int) -> None:
    """What a run on another host wrote last."""
    (out / "lock").mkdir(exist_ok=True)
    fields = {"token": "t", "host": "node7", "boot": "b", "pid": 7, "since": "then", "beat": beat}
    (out / "lock" / "holder.json").write_text(json.dumps(fields))


def test_another_host_keeps_the_directory_as_long_as_its_lease_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 1.0)
    lease(tmp_path, 0)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.2):
            number += 1
            lease(tmp_path, number)

    host = threading.Thread(target=beat)
    host.start()
    try:
        with pytest.raises(RunInUse, match="host node7, process 7, since then"):
            Owner(tmp_path, 0, 3)
    finally:
        ended.set()
        host.join()
    began = time.monotonic()
    Owner(tmp_path, 0, 30).release()
    assert time.monotonic() - began > 1.0
    assert not (tmp_path / "lock" / "holder.json").exists()


def test_a_holder_whose_lease_was_replaced_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock._state, "lost", False)
    owner = Owner(tmp_path, 0, 0)
    time.sleep(0.5)
    assert not run_lock.ownership_lost()
    assert json.loads((tmp_path / "lock" / "holder.json").read_text())["beat"] > 1
    lease(tmp_path, 0)
    deadline = time.monotonic() + 30
    while not run_lock.ownership_lost():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    owner.release()
    assert (tmp_path / "lock" / "holder.json").exists()  # it is the other's
