"""Weight map: the table of Megatron parameters and Hugging Face tensors.

Checkpoint conversion, checkpoint loading and weight sync to vLLM use it. A row names the Hugging
Face tensors of one Megatron parameter and their layout. A layout says how the tensors are joined,
and along which axis tensor parallelism shards the result.

Hugging Face names are those of released checkpoints (`visual.*`, `model.layers.*`). `hf_name`
converts the names that transformers uses in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.fusion import parameter_name
from megatron_vrl.models.pipeline_split import Chunk


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


def _only(tensors: Sequence[Tensor]) -> Tensor:
    """Return the single element of `tensors`."""
    (tensor,) = tensors
    return tensor


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return `tensors` concatenated along the first axis."""
    return torch.cat(list(tensors))


COPY = Layout(_only, lambda whole: [whole], axis=None)
ROW = Layout(_only, lambda whole: [whole], axis=1)
GATE_UP = Layout(_stacked, lambda whole: list(whole.chunk(2)), axis=1, fold=2)
GATE_UP_COPY = Layout(_stacked, lambda whole: list(whole.chunk(2)), axis=None)


def _vocabulary(num_tokens: int) -> Layout:
    """Return the layout of a [vocabulary, hidden] parameter with `num_tokens` rows before
    padding."""
    return Layout(_only, lambda whole: [whole], axis=0, rows=num_tokens)


def _qkv(heads: int, kv_heads: int, *, fused: bool) -> Layout:
    """Return the layout of query, key and value projections.

    Megatron interleaves by KV group: [q of the group, k, v]. Hugging Face stores all q, all k, all
    v; `fused` means that they are one tensor (vision tower).
    """
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
    """One Megatron parameter and its Hugging Face tensors."""

    megatron: str  # name in the chunk's Qwen25VL, by `parameter_name`
    hf_names: tuple[str, ...]  # Hugging Face tensors that it holds
    layout: Layout
    exported: bool = True  # False for a tied head's copy on the last stage


def chunk_rows(arch: Architecture, chunk: Chunk) -> list[Row]:
    """Return the rows of every parameter of one chunk; `pipeline_split.whole_model` is the whole
    model."""
    vocabulary = _vocabulary(arch.vocab)
    rows: list[Row] = []
    if chunk.pre_process:
        rows += _vision_rows(arch)
        rows.append(Row(EMBEDDING, ("model.embed_tokens.weight",), vocabulary))
    for local, layer in enumerate(chunk.layers):
        rows += _layer_rows(arch, local, layer)
    if chunk.post_process:
        rows.append(Row("language.decoder.final_layernorm.weight", ("model.norm.weight",), COPY))
        if not arch.tied_head:
            rows.append(Row(HEAD, ("lm_head.weight",), vocabulary))
        elif not chunk.pre_process:
            rows.append(Row(HEAD, ("model.embed_tokens.weight",), vocabulary, exported=False))
    return rows


EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"


def _layer_rows(arch: Architecture, local: int, layer: int) -> list[Row]:
    """Return the rows of language layer `layer`, which is layer `local` of its chunk."""
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
    """Return the rows of the vision tower and its merger."""
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


def parameters_by_row(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a chunk by `Row.megatron`."""
    return {parameter_name(name): parameter for name, parameter in model.named_parameters()}


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a tensor that may have transformers' in-memory name."""
    for memory, released in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(memory):
            return released + name[len(memory) :]
    return name
