"""Updates of a model of real size and random weights, its checkpoint, and its passes by themselves.

Prints a row as soon as it is measured:

    update      the second update: seconds and peak memory
    checkpoint  asynchronous save: seconds until training goes on, until it is committed, GiB of its
                files, and GiB of GPU memory beyond what was held before
    passes      forward and backward where a host read is an error (on a GPU by
                `torch.cuda.set_sync_debug_mode`, on a CPU by counting), operations, and the share
                of the time in which the GPU ran no kernel
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benches.ops import batches_of, make_policy
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_checks.parts import MODEL_3B
from megatron_vrl.algorithms import token_loss
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.config import Algorithm, Parallel
from megatron_vrl.errors import UserError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.observe.hardware import peak_bytes, reset_peak
from megatron_vrl.observe.op_counter import OpCounter
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy import policy as policies
from megatron_vrl.policy.policy import Policy
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

GIB = 2**30
BYTES_PER_PARAMETER = 14  # bfloat16 weights, float32 main weights and two moments
SIZES = {"frames": 16, "height": 392, "width": 700, "answer_tokens": 256, "group": 8}


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", default=str(MODEL_3B), help="a config.json")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=name)
    arguments = parser.parse_args()
    arguments.dtype, arguments.recompute = "bfloat16", "full"
    silence_libraries()
    mesh = init_mesh(Parallel(), seed=1)
    arch = read_architecture(arguments.model)
    policy = make_policy(arch, mesh, arguments)
    batches = batches_of(arch, mesh, arguments)
    loss = partial(token_loss, cfg=Algorithm(kl=0.0))
    update = lambda step: policy.update(batches, loss, Distribution(), step)  # noqa: E731
    update(0)
    _print("update", Path(arguments.model).stem, _timed(policy, update))
    _print("checkpoint", Path(arguments.model).stem, _saved(policy, arguments.model))
    _print("passes", Path(arguments.model).stem, _passes(policy, update))
    close_mesh()


def _print(what: str, model: str, row: dict[str, Any]) -> None:
    print(json.dumps({"bench": "large", "what": what, "model": model, **row}), flush=True)


def _timed(policy: Policy, update: Callable[[int], Any]) -> dict[str, Any]:
    reset_peak(policy.mesh.device)
    began = time.perf_counter()
    done = update(1)  # ends with a host read
    assert done.applied, done
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_gib": peak_bytes(policy.mesh.device) / GIB}


def _saved(policy: Policy, model: str) -> dict[str, Any]:
    parameters = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
    needed = BYTES_PER_PARAMETER * parameters
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < needed:
            return {"message": f"not run: {free / GIB:.0f} GiB free in {folder.parent}, "
                               f"{needed / GIB:.0f} needed"}  # fmt: skip
        (folder / "template").mkdir()
        shutil.copy(model, folder / "template" / "config.json")
        saver = Saver(folder / "run", policy, folder / "template", keep=1)
        device, began = policy.mesh.device, time.perf_counter()
        reset_peak(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        saver.save("large", {})
        stall = time.perf_counter() - began
        saver.finish()
        total = time.perf_counter() - began
        written = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
        extra = None if before is None else (peak_bytes(device) - before) / GIB
    return {"stall_s": stall, "total_s": total, "written_gib": written / GIB, "gpu_gib": extra}


def _passes(policy: Policy, update: Callable[[int], Any]) -> dict[str, Any]:
    """Return the operations of the passes of an update, and the idle share of the GPU.

    Raises UserError on a CPU if the passes read a value on the host. torch raises on a GPU.
    """
    counter = OpCounter()
    with _around_passes(lambda: counter):
        update(2)
    if policy.mesh.device.type != "cuda":
        if counter.host_reads:
            raise UserError(f"The passes read on the host: {', '.join(counter.host_reads)}.")
        return {"operations": counter.total, "note": "host reads counted: no sync debug on a CPU"}
    with _around_passes(_reads_are_errors):
        update(3)
    trace = profile(activities=[ProfilerActivity.CUDA])
    began = time.perf_counter()
    with trace:
        update(4)
    seconds = time.perf_counter() - began
    return {"operations": counter.total, "idle_share": 1 - _busy(trace) / seconds}


@contextmanager
def _around_passes(context: Callable[[], Any]) -> Iterator[None]:
    """Run Megatron's schedule, forward and backward, inside `context()`."""

    def run(**arguments: Any) -> Any:
        with context():
            return get_forward_backward_func()(**arguments)

    with patch.object(policies, "get_forward_backward_func", lambda: run):
        yield


@contextmanager
def _reads_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _busy(trace: profile) -> float:
    """Return the seconds in which the GPU ran at least one kernel or copy."""
    events = [e.time_range for e in trace.events() or () if e.device_type == DeviceType.CUDA]
    busy, end = 0.0, float("-inf")
    for span in sorted(events, key=lambda span: span.start):  # microseconds
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return busy / 1e6


if __name__ == "__main__":
    run_program(main)
