"""Measure one rank of a cell: updates as in a run, first timed, then profiled.

A round begins at a barrier and lasts as long as its slowest rank. Messages are the ones in
torch.profiler's events: gloo's operations on its threads, NCCL's kernels on the GPU, from start to
end, so that waiting for a slower rank counts. Overlapping messages are counted once. Sends and
receives between stages are counted separately: they are the wait of a stage, the measured bubble.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benches.update import draw_weights, group
from torch.profiler import ProfilerActivity, profile

from megatron_vrl.algorithms import token_loss
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Algorithm, Batch, Optimizer
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.observe.hardware import peak_bytes, reset_peak
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.parallel.mesh import Mesh, gather_objects, init_mesh, world_axis
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from scaling.grid import Layout, Work
from scaling.predict import model_of

Span = tuple[float, float]
P2P = ("gloo:send", "gloo:recv", "SendRecv", "nccl:send", "nccl:recv")


def run_cell(spec: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Return the results of the cell, equal on all ranks. Every rank must call it."""
    silence_libraries()
    layout, work = Layout(**spec["layout"]), Work(**spec["work"])
    mesh = init_mesh(layout.parallel(), seed=1)
    arch = read_architecture(model)
    policy = Policy(arch, model_of(work, str(model)), layout.parallel(), mesh)
    if model.is_dir():
        load_hf_weights(policy.chunks, model)
    else:
        draw_weights(policy)
    policy.start_phase(Optimizer(lr=1e-6), num_steps=10**6)
    asked = Namespace(**work.model_dump(), group=work.answers)
    groups = [group(arch, asked)] * len(range(mesh.data.rank, spec["prompts"], mesh.data.size))
    batches = plan_batches(groups, groups[0], Batch(tokens=groups[0].num_tokens), mesh)
    update = partial(
        policy.update, batches, partial(token_loss, cfg=Algorithm(kl=0.0)), Distribution(), 0
    )
    reset_peak(mesh.device)
    first = update()
    seconds = [_timed(update, mesh) for _ in range(spec["rounds"]["timed"])]
    shares = [_profiled(update, mesh) for _ in range(spec["rounds"]["profiled"])]
    median = {name: statistics.median(share[name] for share in shares) for name in shares[0]}
    everywhere = gather_objects(world_axis(mesh), (mesh.pipeline.rank, median))
    by_stage = [
        statistics.mean(own["p2p"] for stage, own in everywhere if stage == of)
        for of in range(layout.pipeline)
    ]
    return {
        "seconds": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "communication": statistics.mean(own["collective"] for _, own in everywhere),
        "idle_by_stage": by_stage,
        "idle": statistics.mean(by_stage),
        "profiled_s": statistics.mean(own["seconds"] for _, own in everywhere),
        "loss": first.loss,
        "grad_norm": first.grad_norm,
        "tokens": spec["prompts"] * groups[0].num_tokens,
        "micro_batches": len(batches),
        "peak_bytes": max(gather_objects(world_axis(mesh), peak_bytes(mesh.device))),
        "backend": dist.get_backend(),
    }


def _timed(update: Any, mesh: Mesh) -> float:
    wait_for_all(mesh)
    began = time.perf_counter()
    update()
    _finish(mesh)
    return float(max(gather_objects(world_axis(mesh), time.perf_counter() - began)))


def _profiled(update: Any, mesh: Mesh) -> dict[str, float]:
    activities = [ProfilerActivity.CPU]
    if mesh.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    wait_for_all(mesh)
    with profile(activities=activities) as seen:
        began = time.perf_counter()
        update()
        _finish(mesh)
        seconds = time.perf_counter() - began
    kinds: dict[str, list[Span]] = {"collective": [], "p2p": []}
    for event in seen.events():
        if kind := message_kind(event.name, on_gpu=mesh.device.type == "cuda"):
            kinds[kind].append((event.time_range.start, event.time_range.end))
    shares = {kind: union(spans) / 1e6 / seconds for kind, spans in kinds.items()}
    return {"seconds": seconds, **shares}


def message_kind(name: str, on_gpu: bool) -> str:
    """Return "collective" or "p2p" for the name of an event, "" if it is no message."""
    if not name.startswith("ncclDev" if on_gpu else "gloo:"):
        return ""
    return "p2p" if any(word in name for word in P2P) else "collective"


def union(spans: Iterable[Span]) -> float:
    """Return the length of the union of the intervals."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def wait_for_all(mesh: Mesh) -> None:
    _finish(mesh)
    dist.barrier()


def _finish(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
