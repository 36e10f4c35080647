"""A run directory has one owner: real processes, and leases as another host would write them."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vrl.errors import ConfigError, RunInUse
from megatron_vrl.process import run_lock
from megatron_vrl.process.run_lock import Held, Owner, check_owned, held, owned
from tests.running import ENVIRONMENT, ROOT, python, run_python

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
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start(out: Path, rank: int = 0, writes_s: float = 0.0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [python(), "-c", HOLDER, str(out), str(rank), str(writes_s)],
            cwd=ROOT,
            env=ENVIRONMENT | {"WARM_SOCKET": ""},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_told_who_holds_it_and_has_it_once_the_holder_is_killed(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    first = hold(tmp_path)
    with pytest.raises(RunInUse, match=rf"in use by another run \(host .*, process {first.pid}, "):
        Owner(tmp_path, 0, 0.3)
    threading.Timer(0.5, os.kill, (first.pid, signal.SIGKILL)).start()
    Owner(tmp_path, 0, 30).release()


def test_any_rank_and_any_writer_keeps_the_directory(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
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
    """Write the lease that a run on another host wrote last."""
    (out / "lock").mkdir(exist_ok=True)
    fields = {"token": "t", "host": "node7", "boot": "b", "pid": 7, "since": "then", "beat": beat}
    (out / "lock" / "holder.json").write_text(json.dumps(fields))


@pytest.mark.slow
def test_another_host_keeps_the_directory_as_long_as_its_lease_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", 1.0)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
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


def test_a_holder_whose_lease_was_replaced_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock._state, "lost", False)
    owner = Owner(tmp_path, 0, 0)
    time.sleep(0.5)
    assert not run_lock.ownership_lost()
    assert json.loads((tmp_path / "lock" / "holder.json").read_text())["beat"] > 1
    deadline = time.monotonic() + 30
    while not run_lock.ownership_lost():  # the other host beats as well: a beat of ours may
        lease(tmp_path, 0)  # have replaced its lease
        assert time.monotonic() < deadline
        time.sleep(0.05)
    owner.release()
    assert (tmp_path / "lock" / "holder.json").exists()  # it is the other's


def test_a_lease_that_stands_still_is_waited_out_however_short_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", 0.5)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    lease(tmp_path, 0)
    Owner(tmp_path, 0, 0).release()


def test_a_folder_of_a_tool_has_one_call_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "TOOL_WAITS_S", 0.1)
    out = tmp_path / "new" / "out"
    refused = rf"out is in use by another call \(host .*, process {os.getpid()}, since .*\): wait "
    with owned(out):
        with pytest.raises(RunInUse, match=refused), owned(out):
            pass
        with owned(out, "lock-1"):  # other files
            pass
    with pytest.raises(KeyError), owned(out):
        raise KeyError
    with owned(out):
        check_owned(out)
        monkeypatch.setattr(run_lock._state, "lost", True)
        with pytest.raises(RunInUse, match="out was taken by a call on another host"):
            check_owned(out)


def test_a_folder_of_a_tool_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sentence = r"--out .*file/out cannot be written \(Not a directory\): choose another folder"
    with pytest.raises(ConfigError, match=sentence), owned(tmp_path / "file" / "out"):
        pass


@pytest.mark.slow
def test_an_evaluation_in_a_folder_that_another_holds_is_refused(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    first = hold(tmp_path / "out")
    (tmp_path / "a.json").write_text(
        '{"v": {"timestamps": [[0, 2]], "sentences": ["a"], "duration": 10.0}}'
    )
    (tmp_path / "p.jsonl").write_text('{"id": "v/0", "response": "x"}\n')
    command = (
        *(ROOT / "tools" / "evaluate.py", "--benchmark", "charades_sta", "--out", "out"),
        *("--annotations", "a.json", "--predictions", "p.jsonl"),
    )
    done = run_python(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: out is in use by another call (host ")
    assert f", process {first.pid}, since " in last and last.endswith("choose another --out.")
    assert not (tmp_path / "out" / "items.jsonl").exists()
    first.kill()
    first.wait()
    assert run_python(*command, cwd=tmp_path).returncode == 0


def test_what_others_see_of_a_directory(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert held(tmp_path) is None
    first = hold(tmp_path)
    seen = held(tmp_path)
    assert seen and seen.now and f"process {first.pid}, since" in seen.holder
    Owner(tmp_path / "other", 0, 0).close()
    assert held(tmp_path / "other") == Held(now=False)  # given back
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 30
    while (seen := held(tmp_path)) and seen.now and time.monotonic() < deadline:
        time.sleep(0.05)  # its child is being killed
    assert seen and not seen.now and f"process {first.pid}, since" in seen.holder
    monkeypatch.setattr(run_lock, "BEAT_S", 0.5)
    lease(tmp_path, 0)
    began = time.monotonic()
    seen = held(tmp_path)
    assert seen == Held(False, "host node7, process 7, since then")
    assert time.monotonic() - began >= 1.0
    threading.Timer(0.3, lease, (tmp_path, 1)).start()
    seen = held(tmp_path)
    assert seen and seen.now
