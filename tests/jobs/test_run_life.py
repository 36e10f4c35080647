"""The life of a run as processes: launcher, ranks and the whole group are ended at random moments,
and the same call is made again at once; interrupts; two runs in one directory."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.running import CONFIG, ENVIRONMENT, ROOT

SMALL = (
    "sft.stop_metric=''",
    "sft.steps=100000",
    "sft.batch_size=4",
    "grpo.steps=0",
    "checkpoint.every_steps=3",
    "data.evaluation={}",
    "rollout.placement=replay",  # no engine is started for a warm-up
    "rollout.replay_dir=runs/none",
    "grpo.evaluate_every=0",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Call:
    """One call of launch/train.sh in a session of its own, with real Python processes."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.out = folder / "runs" / "life"
        stored = folder / "runs" / "none"
        stored.mkdir(exist_ok=True)
        (stored / "none.jsonl.zst").touch()
        self.log = folder / f"call-{time.monotonic_ns()}.log"
        train = str(ROOT / "launch" / "train.sh")
        command = ["bash", train, "--config", str(CONFIG), *SMALL]
        environment = ENVIRONMENT | {"WARM_SOCKET": "", "PYTHON_EXEC": "", "NPROC": "2"}
        with self.log.open("w") as output:
            self.script = subprocess.Popen(
                [*command, "run.out_dir=runs/life", *overrides],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.script.pid).children()
        return found

    def tree(self) -> list[psutil.Process]:
        found: list[psutil.Process]
        found = psutil.Process(self.script.pid).children(recursive=True)
        return found

    def wait_for(self, more_steps: int) -> None:
        """Wait until the run has made `more_steps` steps more."""
        deadline = time.monotonic() + 200
        while "sft:" not in self.output():
            assert self.script.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.1)
        until = last_step(self.out) + more_steps
        while last_step(self.out) < until:
            assert self.script.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def wait_for_lock(self) -> dict[str, Any]:
        """Wait until a rank of this call holds the run directory; return its lease."""
        deadline = time.monotonic() + 200
        while True:
            assert self.script.poll() is None and time.monotonic() < deadline, self.output()
            holder: dict[str, Any] = json.loads((self.out / "lock" / "holder.json").read_text())
            if holder["pid"] in [rank.pid for rank in self.ranks()]:
                return holder
            time.sleep(0.1)

    def wait(self, seconds: float) -> int:
        """Return the exit code; after `seconds` fail with the state of every process."""
        try:
            return self.script.wait(seconds)
        except subprocess.TimeoutExpired:
            states = [state(process) for process in [psutil.Process(self.script.pid), *self.tree()]]
            pytest.fail("\n".join([f"alive after {seconds:g} s:", *states, self.output()]))

    def end(self) -> None:
        """Kill the launcher and wait until the processes below it have ended."""
        tree = self.tree() if self.script.poll() is None else []
        if self.script.poll() is None:
            self.script.kill()
        self.script.wait()
        assert gone(tree), [state(process) for process in tree if process.is_running()]


def last_step(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def state(process: psutil.Process) -> str:
    """Return parent, state, CPU seconds and command of a process, and where its threads wait."""
    with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        waiting = [
            (task / "wchan").read_text() for task in Path(f"/proc/{process.pid}/task").iterdir()
        ]
        cpu_s = sum(process.cpu_times()[:2])
        command = " ".join(process.cmdline())[:120]
        named = f"{process.pid} of {process.ppid()} {process.status()} {cpu_s:.1f} s {command}"
        return f"{named} {waiting}"
    return f"{process.pid} has ended"


def gone(processes: list[psutil.Process]) -> bool:
    """Wait some seconds until the processes have ended."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


@pytest.fixture
def call(quickstart: Path) -> Iterator[Callable[..., Call]]:
    calls: list[Call] = []

    def start(*overrides: str) -> Call:
        calls.append(Call(quickstart, *overrides))
        return calls[-1]

    yield start
    for one in calls:
        one.end()


def test_one_run_alone_resumes_a_killed_run(
    call: Callable[..., Call],
) -> None:
    """One victim a time, by chance: starting a run takes most of this test's seconds."""
    chance = random.Random(time.time_ns())
    killed = call()
    victim = chance.choice(("launcher", "rank", "group"))
    killed.wait_for(more_steps=4)
    while not (killed.out / "checkpoints" / "latest").exists():
        time.sleep(0.1)
    time.sleep(chance.uniform(0, 1.5))
    helpers, ranks = killed.tree(), killed.ranks()
    if victim == "launcher":
        killed.script.kill()
    elif victim == "group":
        for process in [*helpers, psutil.Process(killed.script.pid)]:
            process.kill()
    else:
        chance.choice(ranks).kill()
    running = call()
    killed.wait(60)
    assert gone(helpers), victim
    holder = running.wait_for_lock()
    refused = call("run.lock_timeout_s=0.5")
    running.wait_for(more_steps=1)
    assert "; resuming at step " in running.output(), running.output()
    assert refused.wait(300) == 2
    (line,) = [line for line in refused.output().splitlines() if line.startswith("error: ")]
    assert f"process {holder['pid']}, since {holder['since']}" in line
    os.killpg(running.script.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    assert running.wait(180) == 0
    assert "Traceback" not in running.output()
    assert running.output().splitlines()[-1].startswith("Stopped after step ")
    steps = [json.loads(line)["step"] for line in (running.out / "metrics.jsonl").open()]
    assert steps == list(range(1, len(steps) + 1))  # one run wrote
    newest = running.out / "checkpoints" / (running.out / "checkpoints" / "latest").read_text()
    assert json.loads((newest / "state.json").read_text())["step"] == steps[-1]


def test_an_interrupt_before_the_first_step_and_a_second_one_end_at_once(
    call: Callable[..., Call],
) -> None:
    for wait_s in (0.5, 6.0):
        early = call()
        time.sleep(wait_s)
        os.killpg(early.script.pid, signal.SIGINT)
        assert early.wait(10) == 130
        assert early.output() == "Interrupted before the first step: nothing was trained.\n"
    twice = call()
    twice.wait_for(more_steps=1)
    tree = twice.tree()
    for process in twice.ranks():
        process.suspend()  # a step that does not end
    os.killpg(twice.script.pid, signal.SIGTERM)
    time.sleep(1)
    os.killpg(twice.script.pid, signal.SIGTERM)
    assert twice.wait(10) == 143
    assert gone(tree)
    assert twice.output().endswith(
        "Ended at once; the same command goes on from the newest checkpoint.\n"
    )
    assert "Traceback" not in twice.output()
