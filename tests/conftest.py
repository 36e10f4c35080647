"""A small quickstart to run the main job on, and how tests start it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is not a failure
settings.load_profile("untimed")

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
Tool = Callable[..., subprocess.CompletedProcess]


def run_python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` with its output caught."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )


def train_command(*overrides: str, ranks: int = 1) -> list[str]:
    """The command line of README over the quickstart's config; torchrun for several ranks."""
    program = ["-m", "megatron_vrl.train", "--config", str(CONFIG), *overrides]
    if ranks > 1:
        torchrun = str(ROOT / "launch" / "torchrun.py")
        program = [torchrun, "--standalone", "--nproc-per-node", str(ranks), *program]
    return [sys.executable, *program]


def kill_job(launcher: subprocess.Popen) -> None:
    """SIGKILL for torchrun and its ranks, which have sessions of their own and would outlive it."""
    processes = [*psutil.Process(launcher.pid).children(recursive=True), launcher]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes[:-1])
    launcher.wait()


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run the quickstart's config in: its `runs/quickstart` holds what
    launch/quickstart.sh makes before training, with 50 clips."""
    folder = tmp_path_factory.mktemp("main-job")
    run = folder / "runs" / "quickstart"
    run.mkdir(parents=True)
    splits = {"sft": 20, "train": 15, "dev": 5, "heldout": 5, "ood": 5}
    sizes = [word for name, size in splits.items() for word in ("--split", f"{name}={size}")]
    tools = ROOT / "tools"
    for arguments in (
        [tools / "make_synthetic.py", "--out", run / "data", *sizes],
        [tools / "make_tiny_model.py", "--out", run / "model-hf"],
        [
            tools / "convert_checkpoint.py",
            "hf-to-megatron",
            run / "model-hf",
            run / "model-megatron",
        ],
    ):
        done = run_python(*arguments)
        assert done.returncode == 0, done.stderr
    return folder
