#!/usr/bin/env python3
"""Run everything that needs a GPU: the tests marked `gpu` and every bench.

    launch/gpu_check.sh [--out runs/gpu-check] [--only tests,update] [--model configs/models/X.json]

It writes OUT/gpu-check.json and OUT/gpu-check.md after each part: machine, versions and commit,
then a row for each measurement. Each part runs in its own process under a time limit. The row of a
part whose library is absent says so, the row of a failed part has its last line. Exit code 1: a
part failed.
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "nvidia-dali-cuda130",
    "transformers",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu-check"),
        metavar="DIR",
        help="default runs/gpu-check",
    )
    parser.add_argument(
        "--only", default="", help="parts to run, separated by commas (default: all)"
    )
    parser.add_argument(
        "--model",
        default=str(ROOT / "configs/models/qwen2.5-vl-3b.json"),
        metavar="FILE",
        help="config.json of the benches, default Qwen2.5-VL-3B's",
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        parts = _parts(arguments.model, Path(folder))
        only = [name for name in arguments.only.split(",") if name]
        unknown = sorted({*only} - {*parts})
        if unknown:
            parser.error(f"--only {','.join(unknown)}: choose of {', '.join(parts)}.")
        rows: list[Row] = []
        report = {"machine": _machine(), "rows": rows}
        _write(report, arguments.out)
        for name, (needs, seconds, command) in tqdm(parts.items(), unit="part"):
            if not only or name in only:
                rows += _run(name, needs, seconds, command)
                _write(report, arguments.out)
    print(_markdown(report), flush=True)
    log_written(arguments.out)
    return int(any(row["status"] in ("failed", "too slow") for row in rows))


def _write(report: Row, out: Path) -> None:
    """Write the report so far: a command that is stopped at a limit keeps its finished parts."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu-check.md").write_text(_markdown(report))


def _parts(model: str, folder: Path) -> dict[str, tuple[tuple[str, ...], float, list[str]]]:
    """Return name -> (modules that it needs, limit in seconds, arguments of Python)."""

    def bench(*argv: str) -> list[str]:
        return ["tools/bench.py", *argv, "--json"]

    te = find_spec("transformer_engine") is not None
    formats = "bfloat16,delayed,current,blockwise" if te else "bfloat16"
    layers = "transformer_engine" if te else "megatron"
    clip = str(folder / "clip.mp4")
    update = ("update", "--model", model, "--recompute", "full", "--micro-batch", "12000")
    both = ("--formats", formats, "--layers", layers)
    return {
        "tests": ((), 900, ["-m", "pytest", "-m", "gpu", "-p", "no:warnings", "tests"]),
        "update": ((), 600, bench(*update, *both)),
        "attention": ((), 300, bench(*update, "--attention", "sdpa", "--layouts", "shared")),
        "head": ((), 300, bench("head", "--hidden", "2048")),
        "clip": (("av",), 120, ["-c", _CLIP, clip]),
        "decode": (
            ("av", "nvidia.dali"),
            300,
            bench("decode", clip, "--paths", "ours-pyav,ours-dali,ours-nvdec"),
        ),
        "sync": (("vllm",), 600, bench("sync", "--hidden", "2048", "--layers", "24")),
        "generate": (
            ("vllm",),
            600,
            bench("generate", "--hidden", "2048", "--layers", "24", "--dtype", "bfloat16"),
        ),
    }


_CLIP = """
import sys, av, numpy as np
y, x = np.mgrid[0:720, 0:1280]
with av.open(sys.argv[1], "w") as file:
    stream = file.add_stream("libx264", rate=30, options={"g": "30", "preset": "veryfast"})
    stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
    for i in range(1350):
        picture = np.stack([x + 3 * i, y + 2 * i, (x + y) // 2 + i], -1).astype(np.uint8)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
    file.mux(stream.encode())
"""  # 45 s of 720p in H.264, a key frame a second


def _run(name: str, needs: tuple[str, ...], seconds: float, command: list[str]) -> list[Row]:
    absent = [module for module in needs if not _importable(module)]
    if absent:
        return [{"part": name, "status": "absent", "message": f"no {', '.join(absent)} here"}]
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return [{"part": name, "status": "too slow", "message": f"more than {seconds:.0f} s"}]
    lines = (done.stdout if done.stdout.strip() else done.stderr).strip().splitlines()
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return [{"part": name, "status": "failed", "message": " ".join(last)[:300]}]
    rows = [json.loads(line) for line in lines if line.startswith('{"bench"')]
    if not rows:
        return [{"part": name, "status": "ok", "message": " ".join(lines[-1:]) or "made"}]
    return [{"part": name, "status": "ok", **row} for row in rows]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _machine() -> dict[str, str]:
    import torch

    values = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    for name, command in {"gpus": query, "commit": ["git", "rev-parse", "--short", "HEAD"]}.items():
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            values[name] = "; ".join(done.stdout.split("\n")).strip("; ")
        except (OSError, subprocess.CalledProcessError):
            values[name] = "unknown"
    values["apex"] = "present" if find_spec("amp_C") else "absent"  # PyPI's apex is another package
    for package in PACKAGES:
        try:
            values[package] = version(package)
        except PackageNotFoundError:
            values[package] = "absent"
    return values


def _markdown(report: Row) -> str:
    """Return the machine on one line, then a row for each measurement."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [machine, "", "| part | status | what |", "|-|-|-|"]
    for row in report["rows"]:
        skipped = ("part", "status", "bench", "machine", "cores", "card")
        what = row.get("message") or ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in skipped and value is not None
        )
        lines.append(f"| {row['part']} | {row['status']} | {what} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_program(main)
