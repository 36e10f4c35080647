"""The one table between Megatron's parameters and Hugging Face's tensors.

Used by checkpoint conversion, by loading and by the hand-over of weights to vLLM. A row says which
published tensors make one Megatron parameter and by which layout; a layout says how they are
joined and along which axis tensor parallelism cuts the result.

Hugging Face names are the published ones (`visual.*`, `model.layers.*`); `hf_name` turns
the names that transformers uses in memory into them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.pipeline_split import Chunk


@dataclass(frozen=True, slots=True)
class Layout:
    """How Hugging Face tensors lie in one Megatron parameter."""

    join: Callable[[Sequence[Tensor]], Tensor]  # published tensors -> whole parameter
    part: Callable[[Tensor], list[Tensor]]  # and back
    axis: int | None  # of the whole parameter, cut over tensor-parallel ranks; None: a copy on each
    fold: int = 1  # parameter's first axis is (fold, rest): gate and up are cut separately
    rows: int | None = None  # first axis without the zeros that make it divisible; None: never any

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """This rank's part, in the shape of the parameter."""
        if self.axis is None or size == 1:
            return whole
        if self.rows is not None:
            whole = F.pad(whole, (0, 0, 0, -self.rows % size))
        folded = whole.unflatten(0, (self.fold, -1)) if self.fold > 1 else whole
        part = folded.chunk(size, dim=self.axis)[rank]
        return part.flatten(0, 1) if self.fold > 1 else part

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole parameter from every rank's part."""
        if self.axis is None or len(shards) == 1:
            return shards[0]
        if self.fold == 1:
            return torch.cat(list(shards), dim=self.axis)[: self.rows]
        folded = [shard.unflatten(0, (self.fold, -1)) for shard in shards]
        return torch.cat(folded, dim=self.axis).flatten(0, 1)


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


COPY = Layout(_only, lambda whole: [whole], axis=None)
ROW = Layout(_only, lambda whole: [whole], axis=1)
GATE_UP = Layout(_stacked, lambda whole: list(whole.chunk(2)), axis=1, fold=2)
GATE_UP_COPY = Layout(_stacked, lambda whole: list(whole.chunk(2)), axis=None)


def _vocabulary(words: int) -> Layout:
    return Layout(_only, lambda whole: [whole], axis=0, rows=words)


def _qkv(heads: int, kv_heads: int, *, fused: bool) -> Layout:
    """Megatron interleaves by KV group: [q of the group, k, v]; published: all q, all k, all v."""
    per_group = heads // kv_heads

    def join(tensors: Sequence[Tensor]) -> Tensor:
        q, k, v = _only(tensors).chunk(3) if fused else tensors
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
    megatron: str  # name in the chunk's Qwen25VL
    published: tuple[str, ...]
    layout: Layout
    exported: bool = True  # False for a tied head's copy on the last stage


def chunk_rows(arch: Architecture, chunk: Chunk) -> list[Row]:
    """Every parameter of one chunk of layers; `chunks.whole` gives those of the model."""
    words = _vocabulary(arch.vocab)
    rows: list[Row] = []
    if chunk.embeds:
        rows += _vision_rows(arch)
        rows.append(Row(EMBEDDING, ("model.embed_tokens.weight",), words))
    for local, layer in enumerate(chunk.layers):
        rows += _layer_rows(arch, local, layer)
    if chunk.ends:
        rows.append(Row("language.decoder.final_layernorm.weight", ("model.norm.weight",), COPY))
        if not arch.tied_head:
            rows.append(Row(HEAD, ("lm_head.weight",), words))
        elif not chunk.embeds:
            rows.append(Row(HEAD, ("model.embed_tokens.weight",), words, exported=False))
    return rows


EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"


def _layer_rows(arch: Architecture, local: int, layer: int) -> list[Row]:
    m, p = f"language.decoder.layers.{local}.", f"model.layers.{layer}."
    qkv = _qkv(arch.heads, arch.kv_heads, fused=False)
    mlp = m + "mlp.linear_"
    return [
        Row(m + "input_layernorm.weight", (p + "input_layernorm.weight",), COPY),
        *(
            Row(
                m + f"self_attention.linear_qkv.{kind}",
                tuple(p + f"self_attn.{x}_proj.{kind}" for x in "qkv"),
                qkv,
            )
            for kind in ("weight", "bias")
        ),
        Row(m + "self_attention.linear_proj.weight", (p + "self_attn.o_proj.weight",), ROW),
        Row(m + "pre_mlp_layernorm.weight", (p + "post_attention_layernorm.weight",), COPY),
        Row(mlp + "fc1.weight", (p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"), GATE_UP),
        Row(mlp + "fc2.weight", (p + "mlp.down_proj.weight",), ROW),
    ]


def _vision_rows(arch: Architecture) -> list[Row]:
    v = arch.vision
    cube = (v.channels, v.temporal_patch, v.patch, v.patch)
    conv = Layout(
        lambda t: _only(t).flatten(1), lambda whole: [whole.unflatten(1, cube)], axis=None
    )
    qkv = _qkv(v.heads, v.heads, fused=True)
    rows = [
        Row("vision.patch_embed.weight", ("visual.patch_embed.proj.weight",), conv),
        Row("vision.merger.norm.weight", ("visual.merger.ln_q.weight",), COPY),
    ]
    for kind in ("weight", "bias"):
        rows.append(Row(f"vision.merger.hidden.{kind}", (f"visual.merger.mlp.0.{kind}",), COPY))
        rows.append(Row(f"vision.merger.out.{kind}", (f"visual.merger.mlp.2.{kind}",), COPY))
    for layer in range(v.layers):
        m, p = f"vision.blocks.layers.{layer}.", f"visual.blocks.{layer}."
        rows.append(Row(m + "input_layernorm.weight", (p + "norm1.weight",), COPY))
        rows.append(Row(m + "pre_mlp_layernorm.weight", (p + "norm2.weight",), COPY))
        for kind in ("weight", "bias"):
            gate_up = (p + f"mlp.gate_proj.{kind}", p + f"mlp.up_proj.{kind}")
            rows += [
                Row(m + f"self_attention.linear_qkv.{kind}", (p + f"attn.qkv.{kind}",), qkv),
                Row(m + f"self_attention.linear_proj.{kind}", (p + f"attn.proj.{kind}",), COPY),
                Row(m + f"mlp.linear_fc1.{kind}", gate_up, GATE_UP_COPY),
                Row(m + f"mlp.linear_fc2.{kind}", (p + f"mlp.down_proj.{kind}",), COPY),
            ]
    return rows


def hf_name(name: str) -> str:
    """The published name of a tensor that may carry transformers' in-memory name."""
    for memory, published in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(memory):
            return published + name[len(memory) :]
    return name
