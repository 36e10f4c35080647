"""Weight map and tensor shapes of Qwen2.5-VL.

Hugging Face names are those of released checkpoints (`visual.*`, `model.layers.*`).
"""

import re

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.family import Shape, WeightMap
from megatron_vrl.models.hf_shapes import language_shapes, linear_shapes, prefixed
from megatron_vrl.models.weight_layouts import (
    COPY,
    EMBEDDING,
    GATE_UP_COPY,
    Layout,
    Row,
    end_rows,
    layer_rows,
    only,
    qkv_layout,
    vocabulary_layout,
)

HF_EMBEDDING, HF_NORM, HF_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{}."


def _rows(arch: Architecture, chunk: Chunk) -> list[Row]:
    """Return the rows of every parameter of one chunk."""
    rows: list[Row] = []
    if chunk.pre_process:
        rows += _vision_rows(arch)
        rows.append(Row(EMBEDDING, (HF_EMBEDDING,), vocabulary_layout(arch.vocab)))
    for local, layer in enumerate(chunk.layers):
        rows += layer_rows(arch, local, LAYER.format(layer))
    return rows + end_rows(arch, chunk, HF_EMBEDDING, HF_NORM, HF_HEAD)


def _vision_rows(arch: Architecture) -> list[Row]:
    """Return the rows of the vision tower and its merger."""
    v = arch.vision
    cube = (v.channels, v.temporal_patch, v.patch, v.patch)
    conv = Layout(lambda t: only(t).flatten(1), lambda whole: [whole.unflatten(1, cube)], axis=None)
    qkv = qkv_layout(v.heads, v.heads, fused=True)
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


def _shapes(arch: Architecture) -> dict[str, Shape]:
    """Return tensor shapes by Hugging Face name."""
    shapes = language_shapes(arch, HF_EMBEDDING, HF_NORM, HF_HEAD, LAYER)
    for layer in range(arch.vision.layers):
        shapes |= prefixed(f"visual.blocks.{layer}.", _block_shapes(arch))
    return shapes | prefixed("visual.", _ends_of_tower(arch))


def _block_shapes(arch: Architecture) -> dict[str, Shape]:
    """Return the shapes of one block of the vision tower, by name within the block."""
    hidden, mlp = arch.vision.hidden, arch.vision.mlp
    linears = {
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    norms: dict[str, Shape] = {"norm1.weight": (hidden,), "norm2.weight": (hidden,)}
    return norms | linear_shapes(linears)


def _ends_of_tower(arch: Architecture) -> dict[str, Shape]:
    """Return the shapes of the patch embedding and the merger."""
    v = arch.vision
    merged = v.hidden * v.merge**2
    linears = {"merger.mlp.0": (merged, merged), "merger.mlp.2": (arch.hidden, merged)}
    ends: dict[str, Shape] = {
        "patch_embed.proj.weight": (v.hidden, v.channels, v.temporal_patch, v.patch, v.patch),
        "merger.ln_q.weight": (v.hidden,),
    }
    return ends | linear_shapes(linears)


WEIGHTS = WeightMap(
    rows=_rows,
    shapes=_shapes,
    released_prefixes={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "model.visual.": "visual.",
    },
    embedding=HF_EMBEDDING,
    head=HF_HEAD,
    language_matrices=re.compile(r"model\.layers\.\d+\..*_proj\.weight"),
)
