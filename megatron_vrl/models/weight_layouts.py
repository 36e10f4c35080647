"""Layouts and rows of a weight map: how Hugging Face tensors are stored in Megatron parameters.

A row names the Hugging Face tensors of one Megatron parameter and their layout. A layout says how
the tensors are joined, and along which axis tensor parallelism shards the result. The rows that all
families share are here; `models/<family>/weight_map.py` makes the whole table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk

EMBEDDING = "language.embedding.word_embeddings.weight"  # Megatron names
HEAD = "language.output_layer.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """Rule by which Hugging Face tensors are stored in one Megatron parameter.

    Example: gate and up of shape [F, C] join to [2F, C]. With `fold=2` and two tensor ranks, rank 0
    holds the first half of gate and the first half of up.
    """

    join: Callable[[Sequence[Tensor]], Tensor]  # Hugging Face tensors -> whole parameter
    part: Callable[[Tensor], list[Tensor]]  # whole parameter -> Hugging Face tensors
    axis: int | None  # sharded axis of the whole parameter; None: a full copy on each tensor rank
    fold: int = 1  # the first axis is (fold, rest); each of the `fold` parts is sharded
    rows: int | None = None  # size of the first axis before zero padding; None: no padding

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return the shard of tensor rank `rank` of `size`, in the shape of the parameter."""
        if self.axis is None or size == 1:
            return whole
        if self.rows is not None:
            whole = F.pad(whole, (0, 0, 0, -self.rows % size))
        folded = whole.unflatten(0, (self.fold, -1)) if self.fold > 1 else whole
        part = folded.chunk(size, dim=self.axis)[rank]
        return part.flatten(0, 1) if self.fold > 1 else part

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the whole parameter from the shards of all tensor ranks."""
        if self.axis is None or len(shards) == 1:
            return shards[0]
        if self.fold == 1:
            return torch.cat(list(shards), dim=self.axis)[: self.rows]
        folded = [shard.unflatten(0, (self.fold, -1)) for shard in shards]
        return torch.cat(folded, dim=self.axis).flatten(0, 1)


def only(tensors: Sequence[Tensor]) -> Tensor:
    """Return the single element of `tensors`."""
    (tensor,) = tensors
    return tensor


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return `tensors` concatenated along the first axis."""
    return torch.cat(list(tensors))


COPY = Layout(only, lambda whole: [whole], axis=None)
ROW = Layout(only, lambda whole: [whole], axis=1)
GATE_UP = Layout(_stacked, lambda whole: list(whole.chunk(2)), axis=1, fold=2)
GATE_UP_COPY = Layout(_stacked, lambda whole: list(whole.chunk(2)), axis=None)


def vocabulary_layout(num_tokens: int) -> Layout:
    """Return the layout of a [vocabulary, hidden] parameter with `num_tokens` rows before
    padding."""
    return Layout(only, lambda whole: [whole], axis=0, rows=num_tokens)


def qkv_layout(heads: int, kv_heads: int, *, fused: bool) -> Layout:
    """Return the layout of query, key and value projections.

    Megatron interleaves by KV group: [q of the group, k, v]. Hugging Face stores all q, all k, all
    v; `fused` means that they are one tensor (vision tower).
    """
    per_group = heads // kv_heads

    def join(tensors: Sequence[Tensor]) -> Tensor:
        q, k, v = only(tensors).chunk(3) if fused else tensors
        parts = [
            q.unflatten(0, (kv_heads, per_group, -1)),
            k.unflatten(0, (kv_heads, 1, -1)),
            v.unflatten(0, (kv_heads, 1, -1)),
        ]
        return torch.cat(parts, dim=1).flatten(0, 2)

    def part(whole: Tensor) -> list[Tensor]:
        grouped = whole.unflatten(0, (kv_heads, per_group + 2, -1))
        tensors = [t.flatten(0, 2) for t in grouped.split([per_group, 1, 1], dim=1)]
        return [torch.cat(tensors)] if fused else tensors

    return Layout(join, part, axis=None if fused else 0)


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter and its Hugging Face tensors."""

    megatron: str  # name in the chunk's VisionLanguageModel, by `parameter_name`
    hf_names: tuple[str, ...]  # Hugging Face tensors that it holds
    layout: Layout
    exported: bool = True  # False for a tied head's copy on the last stage


def end_rows(arch: Architecture, chunk: Chunk, embedding: str, norm: str, head: str) -> list[Row]:
    """Return the rows of the final norm and of the head that `chunk` holds.

    `embedding`, `norm` and `head` are Hugging Face names. A tied head has the embedding's tensor.
    """
    if not chunk.post_process:
        return []
    rows = [Row("language.decoder.final_layernorm.weight", (norm,), COPY)]
    vocabulary = vocabulary_layout(arch.vocab)
    if not arch.tied_head:
        rows.append(Row(HEAD, (head,), vocabulary))
    elif not chunk.pre_process:
        rows.append(Row(HEAD, (embedding,), vocabulary, exported=False))
    return rows


def layer_rows(arch: Architecture, local: int, prefix: str) -> list[Row]:
    """Return the rows of one language layer, which is layer `local` of its chunk.

    `prefix` is the layer's in Hugging Face names, for example "model.layers.3.".
    """
    m, p = f"language.decoder.layers.{local}.", prefix
    qkv = qkv_layout(arch.heads, arch.kv_heads, fused=False)
    kinds = ("weight", "bias") if arch.qkv_bias else ("weight",)
    norms = {"q_layernorm": "q_norm", "k_layernorm": "k_norm"} if arch.qk_norm else {}
    mlp = m + "mlp.linear_"
    return [
        Row(m + "input_layernorm.weight", (p + "input_layernorm.weight",), COPY),
        *(
            Row(
                m + f"self_attention.linear_qkv.{kind}",
                tuple(p + f"self_attn.{x}_proj.{kind}" for x in "qkv"),
                qkv,
            )
            for kind in kinds
        ),
        *(
            Row(m + f"self_attention.{mine}.weight", (p + f"self_attn.{theirs}.weight",), COPY)
            for mine, theirs in norms.items()
        ),
        Row(m + "self_attention.linear_proj.weight", (p + "self_attn.o_proj.weight",), ROW),
        Row(m + "pre_mlp_layernorm.weight", (p + "post_attention_layernorm.weight",), COPY),
        Row(mlp + "fc1.weight", (p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"), GATE_UP),
        Row(mlp + "fc2.weight", (p + "mlp.down_proj.weight",), ROW),
    ]
