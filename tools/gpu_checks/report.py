"""Report of tools/gpu_check.py: machine, and a row for each measurement, as JSON and as a table."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_checks.parts import ROOT

Row = dict[str, Any]
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "nvidia-dali-cuda130",
    "transformers",
)


def write(report: Row, out: Path) -> None:
    """Write the report so far: a command that is stopped at a limit keeps its finished parts."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu-check.md").write_text(markdown(report))


def machine() -> dict[str, str]:
    """Return versions, GPUs, cores and commit."""
    import torch

    values = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    for name, command in {"gpus": query, "commit": ["git", "rev-parse", "--short", "HEAD"]}.items():
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            values[name] = "; ".join(done.stdout.split("\n")).strip("; ")
        except (OSError, subprocess.CalledProcessError):
            values[name] = "unknown"
    values["cores"] = str(os.cpu_count())
    values["apex"] = "present" if find_spec("amp_C") else "absent"  # PyPI's apex is another package
    for package in PACKAGES:
        try:
            values[package] = version(package)
        except PackageNotFoundError:
            values[package] = "absent"
    return values


def markdown(report: Row) -> str:
    """Return the machine on one line, then a row for each measurement."""
    line = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [line, "", "| part | status | what |", "|-|-|-|"]
    for row in report["rows"]:
        skipped = ("part", "status", "bench", "machine", "cores", "card")
        what = row.get("message") or ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in skipped and value is not None
        )
        lines.append(f"| {row['part']} | {row['status']} | {what} |")
    return "\n".join(lines) + "\n"
