"""Jobs of the study: run one or reuse it, and read its steps, seconds and answers."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError, UserError
from megatron_vrl.storage.files import write_file
from studies.settings import ALL_JOBS, DEV_METRIC

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/quickstart.yaml"
NOT_WORK = ("evaluate", "checkpoint")  # all other time of a step is work

Overrides = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Folder, ranks and overrides that all jobs of a study have in common."""

    out: Path  # folder of the study
    ranks: int
    overrides: tuple[str, ...]  # of the command line, for every job

    def train(self, home: Path, overrides: Overrides) -> Path:
        """Run the job in `home` unless it is finished, and return `home`.

        Raises ConfigError if `home` has a job with other settings, UserError if the job fails.
        """
        own = {**ALL_JOBS, **overrides}
        words = [*self.overrides, *(f"{key}={_yaml(value)}" for key, value in own.items())]
        words += [f"video.store_dir={self.out / 'frames'}", f"run.out_dir={home}"]
        settings = json.dumps({"ranks": self.ranks, "overrides": words}, indent=1)
        note = home / "job.json"
        if note.exists() and note.read_text() != settings:
            raise ConfigError(
                f"{home} holds a job with other settings than the study has now: give another "
                "--out, or remove that folder."
            )
        if (home / "summary.json").exists():
            return home
        home.mkdir(parents=True, exist_ok=True)
        write_file(note, settings)
        program = ["-m", "megatron_vrl.cli.train", "--config", str(CONFIG), *words]
        launch = [str(ROOT / "launch/torchrun.py"), "--standalone", "--nproc-per-node"]
        run([*launch, str(self.ranks), *program], f"the job in {home}")
        if not (home / "summary.json").exists():
            raise UserError(f"The job in {home} was stopped; the same command goes on with it.")
        return home

    def tool(self, name: str, *arguments: object) -> None:
        """Run tools/NAME."""
        run([str(ROOT / "tools" / name), *map(str, arguments)], f"tools/{name}")


def run(command: list[str], what: str) -> None:
    """Run a Python program. Raises UserError if it fails."""
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    parent = {"MEGATRON_VRL_PARENT": str(os.getpid())}  # the job ends with this process
    environment = defaults | os.environ | parent | {"PYTHONPATH": path}
    code = subprocess.run([sys.executable, *command], env=environment).returncode
    if code:
        raise UserError(
            f"The study stopped: {what} ended with exit code {code}. Correct what its message "
            "above says; the same command goes on from here."
        )


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def rows_of(home: Path, phase: str) -> list[dict[str, Any]]:
    """Return the metrics rows of a phase ("sft", "grpo", "eval")."""
    lines = (home / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


def step_seconds(home: Path, phase: str) -> list[float]:
    """Return the work seconds of each step: without evaluation and checkpoints."""
    return [
        sum(seconds for name, seconds in row["timing_s"].items() if name not in NOT_WORK)
        for row in rows_of(home, phase)
    ]


def median_step(home: Path, phase: str) -> float:
    """Return the median work seconds of a step, without the first."""
    return statistics.median(step_seconds(home, phase)[1:])


def dev_curve(home: Path) -> dict[int, float]:
    """Return step -> dev metric of a job with one phase."""
    return {row["step"]: row[DEV_METRIC] for row in rows_of(home, "eval") if row["split"] == "dev"}
