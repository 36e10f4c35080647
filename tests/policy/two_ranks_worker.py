"""Run by torchrun on two ranks: what each got is written to OUT/RANK.json.

Usage: two_ranks_worker.py OUT
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_vrl.batching.pack import Group, MicroBatch
from megatron_vrl.config import Batch, Parallel
from megatron_vrl.errors import VideoError
from megatron_vrl.parallel.mesh import Mesh, exchange_objects, init_mesh, raise_on_all_ranks
from megatron_vrl.policy.micro_batches import plan_batches, rebalance, tokens
from megatron_vrl.policy.vision_cache import embed_across_ranks
from megatron_vrl.types import Prompt
from tests.tiny import GROUPS


def main() -> None:
    mesh = init_mesh(Parallel(), seed=1)
    mine = GROUPS[:3] if mesh.rank == 0 else GROUPS[3:4]
    alone = plan_batches(mine, mine[0], Batch(tokens=1), mesh)  # every group a micro-batch
    half = GROUPS[:2] if mesh.rank == 0 else GROUPS[2:]
    budget = Batch(tokens=sum(group.num_tokens for group in GROUPS[2:]))
    finer = plan_batches(half, half[0], budget, mesh, "sequence_mean")
    result: dict[str, Any] = {
        "alone": summary(alone),
        "finer": summary(finer),
        "rebalanced": rebalanced(mine, mesh),
        "exchanged": exchanged(mesh),
        "seen": seen(mesh),
    }
    try:
        with raise_on_all_ranks(mesh):
            if mesh.rank == 1:
                raise VideoError("b.mp4 is empty.")
    except VideoError as error:
        result["error"] = str(error)
    with raise_on_all_ranks(mesh):  # and both are still there
        result["survived"] = True
    (Path(sys.argv[1]) / f"{mesh.rank}.json").write_text(json.dumps(result))


def seen(mesh: Mesh) -> list[list[float]]:
    """Return own embeddings, made by the cache of rank 0 as if ranks were pipeline stages."""
    prompts = [group.prompt for group in (GROUPS[:1] if mesh.rank == 0 else GROUPS[1:3])]

    def embed(of_stage: Sequence[Prompt]) -> list[Prompt]:
        return [replace(p, visual_embeds=(np.full(1, float(len(p.token_ids))),)) for p in of_stage]

    cache: Any = SimpleNamespace(embed=embed) if mesh.rank == 0 else None
    stages: Any = SimpleNamespace(pipeline=mesh.data)
    embedded = embed_across_ranks(cache, stages, prompts)
    return [[float(one.visual_embeds[0][0]), float(len(one.token_ids))] for one in embedded]


def summary(planned: list[MicroBatch]) -> dict[str, Any]:
    return {
        "weights": [batch.weight.tolist() for batch in planned],
        "targets": [batch.target.tolist() for batch in planned],
    }


def rebalanced(mine: list[Group], mesh: Mesh) -> dict[str, Any]:
    groups = rebalance(mine, mesh, tokens)
    original = {group.prompt.id: group for group in GROUPS}
    return {
        "ids": [group.prompt.id for group in groups],
        "tokens": sum(group.num_tokens for group in groups),
        "moved": sum(all(group is not own for own in mine) for group in groups),
        "whole": all(same(group, original[group.prompt.id]) for group in groups),
    }


def same(one: Any, other: Any) -> bool:
    """Dataclasses, tuples and arrays, value by value."""
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(np.array_equal(one, other))


def exchanged(mesh: Mesh) -> dict[str, Any]:
    """Rank r sends r + s objects to rank s: an array each, and an empty one."""

    def sent(sender: int, receiver: int, number: int) -> dict[str, Any]:
        values = np.arange(1001 * (1 + sender) + receiver + number) / 7
        return {
            "numbers": [sender, receiver, number],
            "arrays": [values[:0], values.astype(np.uint8), values],
        }

    outgoing = [[sent(mesh.rank, s, k) for k in range(mesh.rank + s)] for s in range(mesh.world)]
    got = exchange_objects(mesh.data, outgoing)
    arrays = [array for one in got for array in one["arrays"]]
    wanted = [array for one in got for array in sent(*one["numbers"])["arrays"]]
    pairs = list(zip(arrays, wanted, strict=True))
    return {
        "numbers": [one["numbers"] for one in got],
        "equal": all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs),
        "aligned": all(array.ctypes.data % 64 == 0 for array in arrays if array.size),
        "views": not any(array.flags.owndata for array in arrays if array.size),
    }


if __name__ == "__main__":
    main()
