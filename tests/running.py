"""Programs that tests start: the main job, tools, anything in Python."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vrl.process.entry import run_program
from tests import warm

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}

SHORT = (  # a main job of three steps
    "sft.steps=0",
    "grpo.steps=3",
    "grpo.evaluate_every=0",
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "video.decoder=pyav",
    "algorithm.ground_truth_answer=none",  # groups of equal rewards give no update
)


def python() -> str:
    """Return the interpreter of Python programs in ENVIRONMENT."""
    return ENVIRONMENT.get("PYTHON_EXEC", sys.executable)


def run_python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` with its output caught."""
    return subprocess.run(
        [python(), *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
    )


def run_here(
    main: Callable[[], int | None], *arguments: object, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run the `main` of a command in this process, which has loaded the libraries already."""
    argv = [main.__module__, *map(str, arguments)]
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        patch.setattr(sys, "argv", argv)
        patch.chdir(cwd)
        with pytest.raises(SystemExit) as end:
            run_program(main)
    code = end.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def train_command(*overrides: str, ranks: int = 1) -> list[str]:
    """The command line of README over the quickstart's config; torchrun for several ranks."""
    program = ["-m", "megatron_vrl.cli.train", "--config", str(CONFIG), *overrides]
    if ranks > 1:
        torchrun = str(ROOT / "launch" / "torchrun.py")
        program = [torchrun, "--standalone", "--nproc-per-node", str(ranks), *program]
    return [python(), *program]


def sentence_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a program that failed as it should."""
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def train_in(folder: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """A short main job in `folder` with its output caught."""
    return subprocess.run(
        train_command(*SHORT, *overrides, ranks=ranks),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )


def kill_job(launcher: subprocess.Popen[Any]) -> None:
    """SIGKILL for torchrun and its ranks, which have sessions of their own and would outlive it."""
    job = warm.family(launcher.pid)
    for process in job:
        process.kill()
    psutil.wait_procs(job[1:])
    launcher.wait()
