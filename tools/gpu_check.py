#!/usr/bin/env python3
"""Run everything that needs a GPU: updates, the main job, benches, and the tests marked `gpu`.

    launch/gpu_check.sh [--out runs/gpu-check] [--seconds 560] [--only job,large] [--model FILE]
                        [--replay DIR] [--tiny]

It writes OUT/gpu-check.json and OUT/gpu-check.md after each part: machine, versions and commit,
then a row for each measurement. Each part runs in its own process under a time limit, the tiny ones
first. A part that no longer fits into --seconds is not begun. The row of a part whose library or
files are absent says so, the row of a failed part has its last line. --tiny runs the parts at small
sizes on a CPU. Exit code 1: a part failed or was too slow.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_checks.parts import MODEL_3B, ROOT, Part, environment, parts_of
from gpu_checks.report import machine, markdown, write
from tqdm import tqdm

from megatron_vrl.errors import UserError
from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

Row = dict[str, Any]
TINY_EXPECTED = 0.2  # time of a tiny part over that of its large form


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    ends_at = time.monotonic() + arguments.seconds
    _check_device(arguments)
    with tempfile.TemporaryDirectory() as folder:
        parts = parts_of(
            arguments.model, arguments.replay.resolve(), Path(folder), tiny=arguments.tiny
        )
        only = [name for name in arguments.only.split(",") if name]
        unknown = sorted({*only} - {*parts})
        if unknown:
            parser.error(f"--only {','.join(unknown)}: choose of {','.join(parts)}.")
        rows: list[Row] = []
        report = {"machine": machine(), "rows": rows}
        write(report, arguments.out)
        for name, part in tqdm(parts.items(), unit="part"):
            if not only or name in only:
                left = ends_at - time.monotonic()
                rows += [{"part": name, **row} for row in run_part(part, left, arguments.tiny)]
                write(report, arguments.out)
    print(markdown(report), flush=True)
    log_written(arguments.out)
    return int(any(row["status"] in ("failed", "too slow") for row in rows))


def _parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    add, root = parser.add_argument, Path("runs")
    add(
        "--out", type=Path, default=root / "gpu-check", metavar="DIR", help="default runs/gpu-check"
    )
    add("--seconds", type=float, default=560, metavar="N", help="for all parts, default 560")
    add("--only", default="", help="parts to run, separated by commas (default: all)")
    model = "config.json of the large parts, default Qwen2.5-VL-3B's"
    add("--model", default=str(MODEL_3B), metavar="FILE", help=model)
    replay = "made by tools/gpu_checks/record.py, default runs/gpu-check-replay"
    add("--replay", type=Path, default=root / "gpu-check-replay", metavar="DIR", help=replay)
    add("--tiny", action="store_true", help="small sizes, on a CPU")
    return parser


def _check_device(arguments: Namespace) -> None:
    import torch

    if not arguments.tiny and not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU here: run gpu_check on a machine with one, or with --tiny on a CPU."
        )


def run_part(part: Part, left: float, tiny: bool) -> list[Row]:
    """Run one part and return its rows; a part that cannot run has one row that says why.

    `left`: seconds that the check may still take.
    """
    absent = [module for module in part.needs if not _importable(module)]
    absent += [str(file) for file in part.files if not file.exists()]
    if absent:
        return [{"status": "absent", "message": f"no {', '.join(absent)} here"}]
    if tiny and part.gpu_only:
        return [{"status": "not run", "message": f"needs a GPU: {part.gpu_only}"}]
    expected = part.expected * (TINY_EXPECTED if tiny else 1)
    if left < expected:
        words = f"{max(0, left):.0f} s left, about {expected:.0f} needed"
        return [{"status": "not run", "message": words}]
    limit = min(part.limit, left)
    code, out, err = _finished(part.command, limit)
    rows = [{"status": "ok", **json.loads(x)} for x in out.splitlines() if x.startswith('{"bench"')]
    if code is None:
        return [*rows, {"status": "too slow", "message": f"more than {limit:.0f} s"}]
    last = " ".join((err.strip() if code else out.strip() or err.strip()).splitlines()[-1:])
    if code:
        return [*rows, {"status": "failed", "message": last[:300] or f"exit code {code}"}]
    return rows or [{"status": "ok", "message": last or "made"}]


def _finished(command: Sequence[str], limit: float) -> tuple[int | None, str, str]:
    """Run Python with these arguments; return its exit code (None: too slow) and its output.

    All processes that it started are ended with it, so that none keeps the GPU's memory.
    """
    python = os.environ.get("PYTHON_EXEC") or sys.executable
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [python, *command],
            cwd=ROOT / "tools",
            env=environment(),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        out.seek(0), err.seek(0)
        return code, out.read(), err.read()


def _end_group(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left of it
        return
    process.wait()


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


if __name__ == "__main__":
    run_program(main)
