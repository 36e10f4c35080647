"""Save and measure in one launch: `checkpoint_side.py OPTIONS FOLDER`, for `checkpoint.py`.

Rank 0 prints the rounds of each side as JSON, after one round that warms up.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_vrl.checkpoint import checkpoint
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.checkpoint.sharded_state import model_state, state_to_save
from megatron_vrl.config import Model, Optimizer, Parallel
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.parallel.mesh import gather_objects, init_mesh, world_axis
from megatron_vrl.policy.optimizer_state import parameter_states
from megatron_vrl.policy.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "configs" / "models" / "qwen2.5-vl-3b.json"

# Print the most memory that the descendants of process PID ever held alone, until stdin closes.
_SAMPLER = """
import os, select, sys
from pathlib import Path
def descendants(pid):
    try:
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return []
    found = [child for child in children if child != os.getpid()]
    return [one for child in found for one in (child, *descendants(child))]
def private(pid):
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
there = set(descendants(int(sys.argv[1])))  # before the save
most = 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    most = max(most, sum(private(pid) for pid in set(descendants(int(sys.argv[1]))) - there))
print(most)
"""


def main(
    sides: list[str], rounds: int, tensor: int, hidden: int, layers: int, every: bool, out: Path
) -> None:
    parallel = Parallel(tensor=tensor)
    mesh = init_mesh(parallel, seed=1)
    policy = Policy(_architecture(hidden, layers), Model(checkpoint="none"), parallel, mesh)
    policy.start_phase(Optimizer(lr=1e-6), num_steps=1)
    _rewrite(policy, every=True)
    saver = Saver(out / "run", policy, _template(out, mesh.rank), keep=1)
    forms = {"ours": state_to_save, "gathered": gathered}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(1 + rounds):
        for side in sides:
            with patch.object(checkpoint, "state_to_save", forms[side]):
                measured = _measured(policy, saver, f"{side}-{number}", every)
            if number:
                found[side].append(measured)
    if mesh.rank == 0:
        print(json.dumps(found))


def gathered(policy: Policy) -> dict[str, Any]:
    """Return Megatron's own sharded state dict, whose optimizer state is gathered."""
    assert policy.optimizer is not None
    model = model_state(policy)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = policy.optimizer.sharded_state_dict(dict(model), metadata=metadata)
    return {**model, "optimizer": state}


def _architecture(hidden: int, layers: int) -> Architecture:
    """Return the 3B model's architecture at a smaller size, with a tower of one layer."""
    base = read_architecture(MODEL)
    vision = replace(
        base.vision, hidden=160, heads=2, mlp=320, layers=1, full_attention_layers=(0,)
    )
    return replace(
        base,
        hidden=hidden,
        mlp=4 * hidden,
        heads=hidden // 128,
        kv_heads=max(1, hidden // 256),
        layers=layers,
        vocab=8192,
        video_token=8001,
        image_token=8002,
        vision_start_token=8003,
        vision=vision,
    )


def _template(out: Path, rank: int) -> Path:
    """Return a folder with a config.json, which a checkpoint copies."""
    folder = out / "template"
    if rank == 0:
        folder.mkdir()
        shutil.copy(MODEL, folder / "config.json")
    return folder


def _measured(policy: Policy, saver: Saver, name: str, every: bool) -> dict[str, Any]:
    dist.barrier()
    sampler = subprocess.Popen(
        [sys.executable, "-c", _SAMPLER, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sampler.stdout is not None
    sampler.stdout.readline()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the round before has freed
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _status_bytes("VmRSS")
    dist.barrier()
    start = time.perf_counter()
    saver.save(name, {})
    stall = time.perf_counter() - start
    _rewrite(policy, every)
    saver.finish()
    total = time.perf_counter() - start
    extra = _status_bytes("VmHWM") - before + int(sampler.communicate("\n")[0])
    files = saver.root / name / "weights"
    written = sum(file.stat().st_size for file in files.glob(f"__{policy.mesh.rank}_*"))
    ranks = gather_objects(world_axis(policy.mesh), (extra, written, stall, total))
    if policy.mesh.rank == 0:
        shutil.rmtree(files)
    of_all = sum(each[1] for each in ranks)
    return {
        "bytes": of_all,
        "most_written": max(each[1] for each in ranks) * len(ranks) / of_all,
        "peak_ratio": max(each[0] for each in ranks) * len(ranks) / of_all,
        "node_ratio": sum(each[0] for each in ranks) / of_all,
        "stall_s": max(each[2] for each in ranks),
        "total_s": max(each[3] for each in ranks),
    }


def _status_bytes(name: str) -> int:
    """Return a size from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _rewrite(policy: Policy, every: bool) -> None:
    """Write weights and optimizer state as an update does: those that this rank saves, or all."""
    assert policy.optimizer is not None
    with torch.no_grad():
        if not every:
            for shard in state_to_save(policy)["shards"]:
                shard.data.add_(1e-3)
            return
        for chunk in policy.chunks:
            for param in chunk.parameters():
                param.add_(1e-3)
        for state in parameter_states(policy.optimizer):
            for tensor in state.tensors.values():
                tensor.add_(1e-3)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]), out=Path(sys.argv[2]))
