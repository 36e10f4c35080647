"""Sizes of a planned micro-batch on one rank. The planner computes activation memory from them."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_vrl.batching.pack import Answer, Group, MicroBatch, pack, shard_context
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.activations import Attention
from megatron_vrl.models.cascade_plans import indexed_rows
from megatron_vrl.models.segments import padded_attention_sizes, varlen_attention_sizes
from megatron_vrl.models.vision_inputs import shard_steps
from megatron_vrl.planner.workload import PackedBatch
from megatron_vrl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSizes:
    """Sizes of one rank's shard of a micro-batch."""

    rows: int  # packed tokens (rows) of the context-parallel shard
    attention: Attention  # queries, keys and mask entries
    patches: int  # patches that this rank encodes
    all_patches: int  # patches of the whole micro-batch
    vision_tokens: int  # vision tokens among `rows`
    targets: int  # loss tokens of the shard


def rank_sizes(
    model: Model, cfg: Parallel, batch: PackedBatch, context_rank: int | None = None
) -> RankSizes:
    """Return the sizes of one rank's shard of `batch`: of a context-parallel rank, or the largest.

    Of all ranks that share the vision work the one with the most patches is taken.
    """
    shards = _shards(batch, cfg.context, _backend(model))
    if context_rank is not None:
        shards = shards[context_rank : context_rank + 1]
    patches = batch.groups * batch.group.patches
    steps, height, width = batch.group.grid or (0, 0, 0)
    bounds = shard_steps([height * width] * (batch.groups * steps), cfg.tensor * cfg.context)
    return RankSizes(
        rows=batch.rows // cfg.context,
        attention=max((shard[0] for shard in shards), key=_total),
        patches=height * width * max(last - first for first, last in bounds),
        all_patches=patches,
        vision_tokens=batch.groups * batch.group.vision_tokens // cfg.context,
        targets=max(shard[1] for shard in shards),
    )


@cache
def _backend(model: Model) -> str:
    """Return the attention backend of a GPU; `auto` depends on the dtype."""
    if model.attention != "auto":
        return model.attention
    return "sdpa" if model.dtype == "float32" else "flash"


@cache
def _shards(batch: PackedBatch, context: int, backend: str) -> list[tuple[Attention, int]]:
    """Return attention sizes and loss tokens of each context-parallel rank.

    The sizes are counted on a micro-batch that is packed from groups of the planned sizes.
    """
    size = batch.group
    prompt = Prompt(
        id="",
        visuals=(),
        token_ids=np.zeros(size.prompt, np.int64),
        engine_token_ids=(),
        positions=np.zeros((3, size.prompt), np.int64),
    )
    answer = Answer(
        token_ids=np.zeros(size.response, np.int64),
        advantage=0.0,
        engine_logprobs=np.zeros(size.response, np.float32),
    )
    group = Group(prompt=prompt, answers=(answer,) * size.answers)
    whole = pack([group] * batch.groups, at_least=batch.rows)
    shards = [shard_context(whole, rank, context) for rank in range(context)]
    return [(_attention(shard, backend), len(shard.target)) for shard in shards]


def _attention(shard: MicroBatch, backend: str) -> Attention:
    """Return the attention sizes of one context-parallel rank."""
    if backend == "flash":
        gathered = len(shard.key_rows) * (len(shard.key_rows) > len(shard.rows))
        return Attention(queries=indexed_rows(shard), keys=gathered, mask=0, cascade=True)
    if backend == "sdpa":
        queries, keys, mask = padded_attention_sizes(shard)
        return Attention(queries=queries, keys=keys, mask=mask)
    queries, keys = varlen_attention_sizes(shard)
    return Attention(queries=queries, keys=keys, mask=0)


def _total(attention: Attention) -> int:
    return attention.queries + attention.keys + attention.mask
