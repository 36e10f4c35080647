"""Signals to a training process, alone and among children that receive them too."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.running import ENVIRONMENT, ROOT, python

PROGRAM = """
import subprocess, sys, time
from megatron_vrl.process import signals

signals.take_signals()
child = subprocess.Popen(["sleep", "60"])
if "steps" in sys.argv:
    signals.begin_steps()
print("ready", flush=True)
while not signals.stop_asked():
    time.sleep(0.01)
print("asked, the child", "lives" if child.poll() is None else "ended", flush=True)
if "leaves" in sys.argv:
    child.kill()
    sys.exit(0)
time.sleep(60)
"""


@pytest.fixture
def program() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [python(), "-c", PROGRAM, *arguments],
            cwd=ROOT,
            env=ENVIRONMENT | {"WARM_SOCKET": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stderr is not None
        assert line_of(process) == "ready\n", process.stderr.read()
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_requests_a_stop_and_children_continue(
    program: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = program("steps", "leaves")
    os.killpg(process.pid, number)
    assert line_of(process) == "asked, the child lives\n"
    assert process.wait() == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_the_process_with_one_line(
    program: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = program("steps")
    os.killpg(process.pid, number)
    assert line_of(process) == "asked, the child lives\n"
    time.sleep(0.5)  # a repetition within 0.3 s counts as the same
    os.killpg(process.pid, number)
    assert process.wait() == 128 + number
    os.killpg(process.pid, signal.SIGKILL)  # the child holds stderr
    assert process.stderr is not None
    assert process.stderr.read() == (
        "Ended at once; the same command goes on from the newest checkpoint.\n"
    )


def test_before_the_first_step_an_interrupt_ends_the_run_and_sigusr1_waits(
    program: Callable[..., subprocess.Popen[str]],
) -> None:
    process = program()
    os.killpg(process.pid, signal.SIGUSR1)
    assert line_of(process) == "asked, the child lives\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    os.killpg(process.pid, signal.SIGKILL)
    assert process.stderr is not None
    assert process.stderr.read() == "Interrupted before the first step: nothing was trained.\n"
