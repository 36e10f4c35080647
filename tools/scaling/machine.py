"""Measure this machine for planner.hardware.MeasuredMachine.

All ranks work at once, since a rank of a run never has the machine to itself: each one's matrix
product and memory, then an all-reduce within each node, and one over all nodes.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_vrl.config import Parallel
from megatron_vrl.models.precision import DTYPES
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.parallel.mesh import Mesh, gather_objects, init_mesh, world_axis

ROUNDS = 7


def measure(dtype: str) -> dict[str, Any]:
    """Return the measurements, equal on all ranks: the median round of the slowest rank.

    Every rank must call it.
    """
    silence_libraries()
    mesh = init_mesh(Parallel(), seed=1)
    on_gpu = mesh.device.type == "cuda"
    side = 8192 if on_gpu else 1024
    left, right = (torch.randn(side, side, device=mesh.device).to(DTYPES[dtype]) for _ in "ab")
    product = _seconds(lambda: left @ right, mesh)
    values = torch.ones(2**28 if on_gpu else 2**24, device=mesh.device)
    copy = torch.empty_like(values)
    copied = _seconds(lambda: copy.copy_(values), mesh)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine, _ = dist.new_subgroups(per_node)
    message = values[: 2**26 if on_gpu else 2**22]
    link = _bus(message, mine, per_node, mesh)
    whole = dist.group.WORLD
    several = mesh.world > per_node
    hosted = values[: 2**26].cpu()
    taken = _seconds(lambda: copy[: len(hosted)].copy_(hosted), mesh)
    small = torch.ones(1, device=mesh.device)
    steps = max(1, (mesh.world - 1).bit_length())
    memory = (
        torch.cuda.get_device_properties(mesh.device).total_memory
        if on_gpu
        else psutil.virtual_memory().total // per_node
    )
    return {
        "name": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} core",
        "flops": {dtype: 2 * side**3 / product},
        "memory": memory,
        "hbm": 2 * values.nbytes / copied,
        "link": link,
        "network": _bus(message, whole, mesh.world, mesh) if several else link,
        "host": hosted.nbytes / taken,
        "latency": _seconds(lambda: dist.all_reduce(small), mesh) / steps if mesh.world > 1 else 0,
        "per_node": per_node,
        "measured": {
            "ranks": mesh.world,
            "cores": len(os.sched_getaffinity(0)),
            "matrix": side,
            "all_reduce_bytes": message.nbytes,
            "torch": torch.__version__,
            "backend": dist.get_backend(),
            "network_is": "measured" if several else "link, for want of a second node",
        },
    }


def _bus(message: torch.Tensor, group: Any, ranks: int, mesh: Mesh) -> float:
    """Return the bytes per second that a rank sends in an all-reduce, 2 (n - 1) / n of the message.

    One rank alone measures a copy.
    """
    if ranks == 1:
        other = torch.empty_like(message)
        return message.nbytes / _seconds(lambda: other.copy_(message), mesh)
    seconds = _seconds(lambda: dist.all_reduce(message, group=group), mesh)
    return 2 * (ranks - 1) / ranks * message.nbytes / seconds


def _seconds(work: Callable[[], object], mesh: Mesh) -> float:
    times = []
    for number in range(1 + ROUNDS):  # the first warms up
        dist.barrier()
        began = time.perf_counter()
        work()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        slowest = max(gather_objects(world_axis(mesh), time.perf_counter() - began))
        if number:
            times.append(slowest)
    return float(statistics.median(times))
