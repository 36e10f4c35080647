"""Sizes of a planned micro-batch on one rank. The planner computes activation memory from them."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_vrl.batching.pack import Answer, Group, pack, shard_context
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.qwen2_5_vl.activations import Attention
from megatron_vrl.models.segments import padded_attention_sizes, varlen_attention_sizes
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


def rank_sizes(model: Model, cfg: Parallel, batch: PackedBatch) -> RankSizes:
    """Return the sizes of one rank's shard of `batch`."""
    patches = batch.groups * batch.group.patches
    return RankSizes(
        rows=batch.rows // cfg.context,
        attention=_attention(batch, cfg.context, _backend(model)),
        patches=-(-patches // (cfg.tensor * cfg.context)),
        all_patches=patches,
        vision_tokens=batch.groups * batch.group.vision_tokens // cfg.context,
        targets=batch.groups * batch.group.targets // cfg.context,
    )


@cache
def _backend(model: Model) -> str:
    """Return the attention backend of a GPU; `auto` depends on the dtype."""
    if model.attention != "auto":
        return model.attention
    return "sdpa" if model.dtype == "float32" else "flash"


def _attention(batch: PackedBatch, context: int, backend: str) -> Attention:
    """Return the attention sizes of the context-parallel rank with the largest sum of sizes.

    The sizes are counted on a micro-batch that is packed from groups of the planned sizes.
    """
    if backend == "flash":
        return Attention(queries=0, keys=batch.rows * (context > 1), mask=0, cascade=True)
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
    if backend == "sdpa":
        sizes = [padded_attention_sizes(shard) for shard in shards]
    else:
        sizes = [(*varlen_attention_sizes(shard), 0) for shard in shards]
    queries, keys, mask = max(sizes, key=sum)
    return Attention(queries=queries, keys=keys, mask=mask)
