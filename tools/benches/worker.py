"""A side of a bench in a process of its own: it does one round for each line that it is sent.

So sides take turns without sharing a heap, and each has its own peak of memory. Linux only: the
peak is the kernel's, forgotten before each round.
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


class Worker:
    """Started by the bench; `round()` returns what the side's `serve` printed."""

    def __init__(self, script: Path, options: Sequence[object], python: str = sys.executable):
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [python, "-u", str(script), *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | one_thread,
        )

    def round(self) -> Row:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise UserError(f"{' '.join(map(str, self._process.args))} ended before its round.")  # type: ignore[arg-type]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(once: Callable[[], Any], *, held_before: int, fixed: Row, on_gpu: bool = False) -> None:
    """In the side: a round for each line of stdin; `peak_bytes` beyond `held_before`, of a GPU's
    memory or the process's."""
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
    """After all that was launched has run."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or with VmHWM their peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {what}: this bench needs Linux.")
