"""Bytes that a micro-batch saves for its backward pass, counted per tensor.

The method is that of "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198), applied to this project's layers: packed rows without a batch axis, RMSNorm, rotary
angles computed per call, attention without stored scores whose queries, keys and values are copied
by `index_select`, a gated MLP that saves its SiLU, no dropout. On a CPU torch's RMSNorm saves two
float32 copies; on a GPU one kernel saves its input. `tests/planner` compares every term with what
torch saves.

Shape letters: L packed rows of this rank, S rows of norms (L / tensor under sequence parallelism),
C channels, A channels of all query heads of this rank, G channels of its key heads, F channels of
its MLP.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_vrl.batching.pack import Answer, Group, pack, shard_context
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.logprob_head import CHUNK_BYTES
from megatron_vrl.models.segments import padded_attention_sizes, varlen_attention_sizes
from megatron_vrl.planner.workload import PackedBatch
from megatron_vrl.types import Prompt

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Properties of torch's kernels that change the memory."""

    on_gpu: bool = True
    scores: bool = False  # whether masked attention stores all scores in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Sizes of one layer's attention calls."""

    queries: int  # rows, including padding of buckets
    keys: int  # rows; a prompt's keys count once per answer
    mask: int  # entries of masks


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Sizes of one layer on one rank, and the bytes it saves."""

    rows: int  # L
    norm_rows: int  # S
    channels: int  # C
    queries: int  # A
    keys: int  # G
    heads: int
    mlp: int  # F
    number: int  # bytes of a value
    stored: int  # bytes of a value of a linear layer's saved input: 1 in FP8
    attention: Attention
    kernels: Kernels

    def whole(self) -> int:
        """Return the bytes saved without recompute."""
        rest = self.stored * self.norm_rows * self.channels * 2 + self.norm() * 2
        return rest + self.attends() + self.projects() + self.computes_mlp()

    def selective(self) -> int:
        """Return the bytes saved when attention is recomputed: rotated queries and keys, and the
        fused QKV output that `v` is a view of."""
        kept = self.number * self.rows * (2 * self.queries + 3 * self.keys)
        return self.whole() - self.attends() + self.rotary() + kept

    def full(self) -> int:
        """Return the bytes saved when the whole layer is recomputed: its input."""
        return self.number * self.norm_rows * self.channels

    def kept(self, recompute: str) -> int:
        """Return the bytes saved for the backward pass under `model.recompute`."""
        return {"none": self.whole, "selective": self.selective, "full": self.full}[recompute]()

    def again(self, recompute: str) -> int:
        """Return the additional bytes that one layer at a time holds while it is recomputed."""
        return {"none": 0, "selective": self.attends(), "full": self.whole()}[recompute]

    def norm(self) -> int:
        """Return the bytes that an RMSNorm saves."""
        each = self.number if self.kernels.on_gpu else 2 * FLOAT32
        return self.norm_rows * (each * self.channels + FLOAT32)

    def rotary(self) -> int:
        """Return the bytes of cosines and sines, for queries and keys."""
        return 4 * self.number * self.rows * (self.queries // self.heads)

    def attends(self) -> int:
        """Return the bytes that core attention saves."""
        a = self.attention
        copies = self.number * (2 * a.queries * self.queries + 2 * a.keys * self.keys)
        scores = FLOAT32 * self.heads * a.mask if self.kernels.scores else 0
        sums = FLOAT32 * self.heads * a.queries
        return self.rotary() + copies + sums + self.number * a.mask + scores

    def projects(self) -> int:
        """Return the bytes that the output projection saves."""
        return self.stored * self.rows * self.queries

    def computes_mlp(self) -> int:
        """Return the bytes that the MLP saves.

        They are gate and up, the SiLU of the gate, a copy of up (Megatron adds an offset of 0), and
        the product, which the second matrix reads.
        """
        return self.rows * self.mlp * (4 * self.number + self.stored)

    def working(self) -> int:
        """Return the largest temporary gradients of the layer's backward pass.

        The maximum is in the MLP: gradients of the product, of one factor, of the layer's output
        and of the second matrix.
        """
        gathered = self.rows * self.channels if self.norm_rows < self.rows else 0
        rows = 2 * self.rows * self.mlp + 2 * self.norm_rows * self.channels + gathered
        return self.number * (rows + self.mlp * self.channels)


def dtype_bytes(model: Model) -> int:
    """Return the bytes of a value of `model.dtype`."""
    return 2 if model.dtype == "bfloat16" else 4


def language_layer(
    arch: Architecture, model: Model, cfg: Parallel, batch: PackedBatch, kernels: Kernels
) -> Layer:
    """Return the sizes of a language layer."""
    rows = batch.rows // cfg.context
    number = dtype_bytes(model)
    return Layer(
        rows=rows,
        norm_rows=rows // cfg.tensor if cfg.sequence else rows,
        channels=arch.hidden,
        queries=arch.hidden // cfg.tensor,
        keys=arch.kv_heads * arch.head_dim // cfg.tensor,
        heads=arch.heads // cfg.tensor,
        mlp=arch.mlp // cfg.tensor,
        number=number,
        stored=number if model.fp8 == "none" else 1,
        attention=_attention(batch, cfg.context, _in_buckets(model)),
        kernels=kernels,
    )


@cache
def _in_buckets(model: Model) -> bool:
    """Return whether attention on a GPU runs in masked buckets (sdpa); `auto` depends on the
    dtype."""
    return model.attention == "sdpa" or (model.attention == "auto" and model.dtype == "float32")


def _attention(batch: PackedBatch, context: int, masks: bool) -> Attention:
    """Return the attention sizes of the context-parallel rank that reads the most.

    They are measured on a micro-batch built with the planned sizes.
    """
    size = batch.of
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
    shares = [shard_context(whole, rank, context) for rank in range(context)]
    if masks:
        sizes = [padded_attention_sizes(share) for share in shares]
    else:
        sizes = [(*varlen_attention_sizes(share), 0) for share in shares]
    queries, keys, mask = max(
        sizes, key=lambda candidates: candidates[2] + candidates[0] + candidates[1]
    )
    return Attention(queries=queries, keys=keys, mask=mask)


def recompute_of_tower(model: Model) -> str:
    """Return the vision tower's recompute: `selective` excludes it, and a frozen tower saves
    nothing."""
    return "full" if model.recompute == "full" and not model.freeze_vision else "none"


def vision_layer(
    arch: Architecture, model: Model, cfg: Parallel, batch: PackedBatch, kernels: Kernels
) -> Layer:
    """Return the sizes of a block of the vision tower: all channels, and this rank's part of the
    patches."""
    v = arch.vision
    patches = -(-batch.groups * batch.of.patches // (cfg.tensor * cfg.context))
    number = dtype_bytes(model)
    return Layer(
        rows=patches,
        norm_rows=patches,
        channels=v.hidden,
        queries=v.hidden,
        keys=v.hidden,
        heads=v.heads,
        mlp=v.mlp,
        number=number,
        stored=number,
        attention=Attention(queries=patches, keys=patches, mask=0),
        kernels=kernels,
    )


def vision_kept(
    arch: Architecture, model: Model, cfg: Parallel, batch: PackedBatch, kernels: Kernels
) -> int:
    """Return the bytes saved by the vision tower with its merger, and by the inserted vision
    embeddings."""
    if not batch.of.patches:
        return 0
    layer = vision_layer(arch, model, cfg, batch, kernels)
    kept = merger_kept(arch, model, cfg, batch, layer)
    if not model.freeze_vision:
        kept += arch.vision.layers * layer.kept(recompute_of_tower(model))
        # A rank's patches are a view, which keeps all patches alive.
        kept += layer.number * batch.groups * batch.of.patches * arch.vision.patch_values
    return kept


def merger_kept(
    arch: Architecture, model: Model, cfg: Parallel, batch: PackedBatch, block: Layer
) -> int:
    """Return the part of `vision_kept` that is freed before the backward pass of the tower's
    blocks."""
    if model.freeze_vision and model.freeze_merger:
        return 0
    tokens = batch.groups * batch.of.vision_tokens // cfg.context
    patch_channels = block.number * block.rows * arch.vision.hidden
    kept = 3 * patch_channels  # output of the norm; input and output of the GELU
    kept += block.norm() * (not model.freeze_vision)
    return kept + block.number * tokens * arch.hidden


def head_kept(
    arch: Architecture, model: Model, batch: PackedBatch, layer: Layer, context: int
) -> int:
    """Return the bytes saved by the final norm, and by the rows that predict answer tokens."""
    targets = batch.groups * batch.of.targets // context
    return layer.norm() + dtype_bytes(model) * targets * arch.hidden


def head_working(
    num_tokens: int, arch: Architecture, model: Model, batch: PackedBatch, context: int
) -> int:
    """Return the temporary bytes of the head, which holds `num_tokens` of the vocabulary on this
    rank.

    They are two buffers of logits and their product in `dtype`, the head's gradient in float32 and
    in `dtype`, and the gradient of the rows.
    """
    number = dtype_bytes(model)
    targets = batch.groups * batch.of.targets // context
    rows = min(targets, max(1, CHUNK_BYTES // (FLOAT32 * num_tokens)))
    product = number if number < FLOAT32 else 0
    logits = rows * num_tokens * (2 * FLOAT32 + product)
    weight = num_tokens * arch.hidden * (FLOAT32 + product)
    return logits + weight + number * targets * arch.hidden


def plan_bytes(layer: Layer) -> int:
    """Return the bytes of a micro-batch's attention plan, which all layers share."""
    a = layer.attention
    return INT64 * (a.queries + a.keys + layer.rows) + a.mask
