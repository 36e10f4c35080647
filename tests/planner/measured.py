"""Memory of a real Policy update, measured by torch, independent of the planner.

Run alone or by torchrun as `measured.py CASES.json OUT.json`. Each case is one update of a random
model. The row of every rank holds the bytes of weights, gradients and optimizer state (sizes of
their tensors); the peak of bytes saved for backward passes (autograd's hooks, each storage once);
and the peak of all tensor storage (outputs of every operation).
"""

import gc
import json
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import close_mesh, gather_objects, init_mesh, world_axis
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from tests import tiny_qwen3_vl
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, prompt, token_loss, video

VISION = VisionArchitecture(
    hidden=320,
    mlp=864,
    layers=4,
    heads=4,
    patch=14,
    temporal_patch=2,
    merge=2,
    window=112,
    full_attention_layers=(1, 3),
    channels=3,
    tokens_per_second=2.0,
)
LARGE = Architecture(  # 32 million parameters
    family="qwen2_5_vl",
    hidden=512,
    mlp=1536,
    layers=5,
    heads=8,
    kv_heads=4,
    head_dim=64,
    vocab=8192,
    rope_base=1e6,
    mrope_section=(8, 12, 12),
    norm_eps=1e-6,
    tied_head=False,
    max_positions=4096,
    video_token=VIDEO_TOKEN,
    image_token=IMAGE_TOKEN,
    vision_start_token=VISION_START,
    vision_end_token=VISION_END,
    qkv_bias=True,
    vision=VISION,
)
SMALL = replace(
    LARGE,
    hidden=256,
    mlp=768,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=32,
    vocab=2048,
    mrope_section=(4, 6, 6),
    vision=replace(VISION, hidden=128, mlp=352, layers=2),
)
QWEN3 = replace(
    SMALL,
    family="qwen3_vl",
    head_dim=64,  # twice hidden / heads
    mrope_section=(12, 10, 10),
    qkv_bias=False,
    qk_norm=True,
    vision=replace(
        SMALL.vision,
        layers=4,
        patch=16,
        window=0,
        full_attention_layers=(),
        tokens_per_second=0.0,
        position_grid=16,
        deepstack_layers=(0, 1, 2),
    ),
)
ARCHITECTURES = {"large": LARGE, "small": SMALL, "qwen3": QWEN3}


class Live:
    """Bytes of storages that are alive, and the most there were."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._holders: dict[int, int] = {}

    def hold(self, holder: Any, storage: torch.UntypedStorage) -> None:
        """Count a storage until `holder` dies, once however many hold it."""
        key, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += size
            self.most = max(self.most, self.now)
        weakref.finalize(holder, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.now -= size


class Saved:
    """Object that autograd's pack hook stores in place of a saved tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Allocated(TorchDispatchMode):
    """Storages that operations make."""

    def __init__(self, live: Live, known: set[int]) -> None:
        super().__init__()
        self._live, self._known = live, known
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self._known and storage not in self._seen:
                    self._seen.add(storage)
                    self._live.hold(storage, storage)
        return out


@contextmanager
def saved_for_backward(live: Live, persistent: set[int]) -> Iterator[None]:
    def pack(tensor: torch.Tensor) -> Saved:
        holder = Saved(tensor)
        if tensor.untyped_storage().data_ptr() not in persistent:
            live.hold(holder, tensor.untyped_storage())
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield


def groups_of(case: dict[str, Any]) -> list[Group]:
    rng = np.random.default_rng(1)
    grid, answers = tuple(case["grid"]), case["answers"]
    if case["size"] == "qwen3":
        asked = [
            tiny_qwen3_vl.prompt([tiny_qwen3_vl.video(grid, 1.0, seed)], seed * 4)
            for seed in range(case["groups"])
        ]
    else:
        asked = [prompt([video(grid, 1.0, seed)], seed * 4) for seed in range(case["groups"])]
    return [
        Group(
            prompt=one,
            answers=tuple(
                Answer(
                    token_ids=rng.integers(0, 90, length),
                    advantage=1.0,
                    engine_logprobs=np.zeros(length, np.float32),
                )
                for length in answers
            ),
        )
        for one in asked
    ]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's row of one case. Every rank must call it."""
    parallel = Parallel.model_validate(case.get("parallel", {}))
    model = Model(checkpoint="", **{"attention": "sdpa"} | case.get("model", {}))
    mesh = init_mesh(parallel, seed=1)
    policy = Policy(ARCHITECTURES[case["size"]], model, parallel, mesh)
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.normal_(std=0.02)
    policy.start_phase(Optimizer(lr=1e-5), num_steps=2)
    groups = groups_of(case)
    budget = Batch(tokens=case["tokens"], layout=case.get("layout", "shared"))
    batches = plan_batches(groups[mesh.data.rank :: mesh.data.size], groups[0], budget, mesh)
    policy.update(batches, token_loss, Distribution(), 0)  # what is made once
    row = _lasting(policy)
    persistent = {t.untyped_storage().data_ptr() for t in _lasting_tensors(policy)}
    gc.collect()
    saved, allocated = Live(), Live()
    with saved_for_backward(saved, persistent), Allocated(allocated, persistent):
        passes = _peak_of_passes(policy, allocated)
        policy.update(batches, token_loss, Distribution(), 1)
    row |= {"saved": saved.most, "allocated": allocated.most, "passes": passes[0]}
    row["stage"] = mesh.pipeline.rank
    row |= {"prompt": len(groups[0].prompt.token_ids), "micro_batches": len(batches)}
    del policy, batches
    gc.collect()
    rows = gather_objects(world_axis(mesh), row)
    close_mesh()
    return {"case": case, "ranks": rows}


def _peak_of_passes(policy: Policy, live: Live) -> list[int]:
    """Return a list that gets the peak when the last backward pass is done.

    The sum over ranks comes later: over gloo it copies the gradients.
    """
    found: list[int] = []
    finish = policy._finalize_gradients

    def noting(*arguments: Any, **named: Any) -> Any:
        found.append(live.most)
        return finish(*arguments, **named)

    vars(policy)["_finalize_gradients"] = noting
    return found


def _lasting_tensors(policy: Policy) -> Iterator[torch.Tensor]:
    for chunk in policy.chunks:
        yield from chunk.parameters()
    for wrapped in policy._ddp:
        for buffer in wrapped.buffers:
            yield buffer.grad_data
            if buffer.param_data is not None:
                yield buffer.param_data
    yield from _state(policy)


def _state(policy: Policy) -> Iterator[torch.Tensor]:
    assert policy.optimizer is not None
    for part in policy.optimizer.chained_optimizers:
        for tensors in part.optimizer.state.values():
            yield from (t for t in tensors.values() if isinstance(t, torch.Tensor))
        for group in part.optimizer.param_groups:
            yield from (p for p in group["params"] if p.dtype == torch.float32)


def _lasting(policy: Policy) -> dict[str, int]:
    """Bytes of tensors, each storage once: a float32 model's weights are its main weights."""
    weights = _bytes(p for chunk in policy.chunks for p in chunk.parameters())
    gradients = _bytes(b.grad_data for wrapped in policy._ddp for b in wrapped.buffers)
    own = {t.untyped_storage().data_ptr() for c in policy.chunks for t in c.parameters()}
    state = [t for t in _state(policy) if t.untyped_storage().data_ptr() not in own]
    return {"weights": weights, "gradients": gradients, "optimizer": _bytes(iter(state))}


def _bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Return the bytes of the tensors' elements; a parameter's storage may be larger, as a view of
    its buffer."""
    return sum(t.numel() * t.element_size() for t in tensors)


def main(cases: Path, out: Path) -> None:
    rows = [measure(case) for case in json.loads(cases.read_text())]
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
