"""launch/rollout_worker.sh on a machine with GPUs: one worker for each `rollout.tensor` of them.

The machine's nvidia-smi and its Python are scripts; the Python answers for `--gpu-groups` with what
`gpu_groups` returns, and otherwise lives as the test asks.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vrl.errors import ConfigError
from megatron_vrl.rollout.workers.gpu_groups import gpu_groups
from tests.launch.test_launch import ROOT, fake_bin

Lines = Callable[[], list[str]]  # reads the log
Machine = tuple[Callable[..., subprocess.Popen[bytes]], Lines]
PYTHON = """#!/bin/bash
case "$*" in *--gpu-groups*) printf '%s\\n' {groups}; exit ;; esac
echo "start $$ gpus=${{CUDA_VISIBLE_DEVICES-none}} ${{*: -2}}" >>{log}
trap 'echo "stopped $$" >>{log}; exit 0' TERM
while [[ ! -e {folder}/end-$$ ]]; do sleep 0.05; done
exit "$(<{folder}/end-$$)"
"""


@pytest.mark.parametrize(
    ("tensor", "count", "visible", "expected"),
    [
        (1, 3, None, ["0", "1", "2"]),
        (2, 5, None, ["0,1", "2,3"]),
        (8, 8, None, ["0,1,2,3,4,5,6,7"]),
        (1, 2, "GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
        (2, 4, "7,6,5,4", ["7,6", "5,4"]),
        (4, 0, None, [""]),
    ],
)
def test_gpus_are_divided_by_the_tensor_size(
    tensor: int, count: int, visible: str | None, expected: list[str]
) -> None:
    assert gpu_groups(tensor, count, visible) == expected


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.tensor=4, but torch sees 2 GPUs here: lower"):
        gpu_groups(4, 2, None)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Start the script on a machine with GPUs; yield (start, read the log)."""
    path = fake_bin(tmp_path / "bin", "bash", "dirname", "sleep")
    log = tmp_path / "log"
    log.touch()
    (path / "nvidia-smi").write_text("#!/bin/bash\necho GPU 0\n")
    scripts: list[subprocess.Popen[bytes]] = []

    def start(groups: str, *arguments: str) -> subprocess.Popen[bytes]:
        python = path / "python3"
        python.write_text(PYTHON.format(groups=groups, log=log, folder=tmp_path))
        for script in (python, path / "nvidia-smi"):
            script.chmod(0o755)
        env = {**os.environ, "PATH": str(path), "PYTHON": str(python), "PYTHON_EXEC": ""}
        command = ["bash", str(ROOT / "launch" / "rollout_worker.sh"), *arguments]
        scripts.append(subprocess.Popen(command, env=env, start_new_session=True))
        return scripts[-1]

    yield start, lambda: log.read_text().splitlines()
    for script in scripts:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()


def wait_for(lines: Lines, count: int) -> list[list[str]]:
    until = time.monotonic() + 20
    while len(lines()) < count:
        assert time.monotonic() < until, lines()
        time.sleep(0.05)
    return [line.split() for line in lines()]


def test_each_group_has_a_worker_and_a_dead_one_starts_again(
    machine: Machine, tmp_path: Path
) -> None:
    start, lines = machine
    script = start("0,1 2,3", "--port", "7000")
    first = wait_for(lines, 2)
    assert {(row[2], row[4]) for row in first} == {("gpus=0,1", "7000"), ("gpus=2,3", "7001")}
    (killed,) = [row[1] for row in first if row[2] == "gpus=2,3"]
    (tmp_path / f"end-{killed}").write_text("3")  # a weight sync was broken off
    again = wait_for(lines, 3)[2]
    assert (again[2], again[4]) == ("gpus=2,3", "7001")
    script.terminate()
    assert script.wait(20) == 0
    stopped = {line.split()[1] for line in lines() if line.startswith("stopped")}
    assert stopped == {row[1] for row in first if row[1] != killed} | {again[1]}


def test_a_refused_config_ends_all_workers(machine: Machine, tmp_path: Path) -> None:
    start, lines = machine
    script = start("0 1", "--config", "x")
    first = wait_for(lines, 2)
    (tmp_path / f"end-{first[0][1]}").write_text("2")
    assert script.wait(20) == 2
    assert f"stopped {first[1][1]}" in lines()
