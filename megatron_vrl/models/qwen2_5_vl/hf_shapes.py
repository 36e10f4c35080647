"""Shape of every tensor of a Hugging Face checkpoint, derived from the architecture.

Conversion compares these shapes with the file before it reads or writes a tensor. A checkpoint of
another model is refused with the name of the first tensor that differs.
"""

from math import prod

import torch

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.qwen2_5_vl.weight_map import Row

Shape = tuple[int, ...]


def hf_shapes(arch: Architecture) -> dict[str, Shape]:
    """Return tensor shapes by Hugging Face name. A tied head has no tensor of its own."""
    hidden = arch.hidden
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (arch.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not arch.tied_head:
        shapes["lm_head.weight"] = (arch.vocab, hidden)
    for layer in range(arch.layers):
        shapes |= _prefixed(f"model.layers.{layer}.", _layer_shapes(arch))
    for layer in range(arch.vision.layers):
        shapes |= _prefixed(f"visual.blocks.{layer}.", _block_shapes(arch))
    return shapes | _prefixed("visual.", _ends_of_tower(arch))


def num_parameters(arch: Architecture) -> int:
    """Return the exact number of trainable parameters; a tied head counts once."""
    return sum(prod(shape) for shape in hf_shapes(arch).values())


def megatron_shape(row: Row, shapes_by_name: dict[str, Shape]) -> Shape:
    """Return the shape of the whole Megatron parameter of `row`, without vocabulary padding."""
    parts = [torch.empty(shapes_by_name[name], device="meta") for name in row.hf_names]
    return tuple(row.layout.join(parts).shape)


def _layer_shapes(arch: Architecture) -> dict[str, Shape]:
    """Return the shapes of one language layer, by name within the layer."""
    hidden, kv = arch.hidden, arch.kv_heads * arch.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, arch.heads * arch.head_dim),
        "mlp.gate_proj.weight": (arch.mlp, hidden),
        "mlp.up_proj.weight": (arch.mlp, hidden),
        "mlp.down_proj.weight": (hidden, arch.mlp),
    }
    for name, rows in {"q": arch.heads * arch.head_dim, "k": kv, "v": kv}.items():
        shapes[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    return shapes


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
    return norms | _linear_shapes(linears)


def _ends_of_tower(arch: Architecture) -> dict[str, Shape]:
    """Return the shapes of the patch embedding and the merger."""
    v = arch.vision
    merged = v.hidden * v.merge**2
    linears = {"merger.mlp.0": (merged, merged), "merger.mlp.2": (arch.hidden, merged)}
    ends: dict[str, Shape] = {
        "patch_embed.proj.weight": (v.hidden, v.channels, v.temporal_patch, v.patch, v.patch),
        "merger.ln_q.weight": (v.hidden,),
    }
    return ends | _linear_shapes(linears)


def _linear_shapes(linears: dict[str, tuple[int, int]]) -> dict[str, Shape]:
    """Return weight and bias shapes of linear layers with (output, input) sizes."""
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in linears.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def _prefixed(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Return `shapes` with `prefix` before each name."""
    return {prefix + name: shape for name, shape in shapes.items()}
