"""Process of one side of a bench: one round for each line on its stdin.

Sides take turns without sharing a heap, and each has its own peak of memory. The peak is the one
that the Linux kernel keeps, reset before each round.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_vrl.errors import UserError

Row = dict[str, Any]
TOOLS = Path(__file__).resolve().parents[1]  # sides import benches.worker


class Worker:
    """A side, as the bench sees it. `round()` returns the row that the side's `serve` printed."""

    def __init__(self, script: Path, options: Sequence[object], python: str = sys.executable):
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [python, "-u", str(script), *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | one_thread | {"PYTHONPATH": path},
        )

    def round(self) -> Row:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                row: Row = json.loads(line)
                return row
        raise UserError(f"{' '.join(map(str, self._process.args))} ended before its round.")  # type: ignore[arg-type]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(once: Callable[[], Any], *, held_before: int, fixed: Row, on_gpu: bool = False) -> None:
    """Run a round for each line of stdin and print its row; the side's process calls it.

    `peak_bytes` counts beyond `held_before`, in the memory of the GPU or of the process.
    """
    for _ in sys.stdin:
        if on_gpu:
            _forget_and_wait()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        once()
        peak = _gpu_peak() if on_gpu else resident("VmHWM")
        seconds = time.perf_counter() - start
        peak -= held_before
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, **fixed}), flush=True)


def _forget_and_wait() -> None:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()


def _gpu_peak() -> int:
    """Return the peak of allocated GPU memory in bytes, when all launched kernels have ended."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def resident(what: str = "VmRSS") -> int:
    """Return the resident bytes of this process now, or with VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {what}: this bench needs Linux.")
