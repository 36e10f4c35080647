"""Weight map and tensor shapes of Qwen3-VL.

Hugging Face names are those of released checkpoints and of transformers in memory
(`model.language_model.*`, `model.visual.*`).
"""

import re

from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.family import Shape, WeightMap
from megatron_vrl.models.hf_shapes import language_shapes, prefixed
from megatron_vrl.models.weight_layouts import (
    COPY,
    EMBEDDING,
    Layout,
    Row,
    end_rows,
    layer_rows,
    only,
    qkv_layout,
    vocabulary_layout,
)

LANGUAGE, VISUAL = "model.language_model.", "model.visual."
HF_EMBEDDING, HF_NORM = LANGUAGE + "embed_tokens.weight", LANGUAGE + "norm.weight"
HF_HEAD = "lm_head.weight"
LAYER = LANGUAGE + "layers.{}."
KINDS = ("weight", "bias")


def segments(arch: VisionArchitecture) -> list[range]:
    """Return the blocks of the tower, cut after each block with a DeepStack merger.

    Example: 24 blocks with mergers at 5, 11 and 17 give 0 to 5, 6 to 11, 12 to 17, 18 to 23.
    """
    cuts = {layer + 1 for layer in arch.deepstack_layers if layer < arch.layers}
    ends = sorted(cuts | {arch.layers})
    return [range(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def _rows(arch: Architecture, chunk: Chunk) -> list[Row]:
    """Return the rows of every parameter of one chunk."""
    rows: list[Row] = []
    if chunk.pre_process:
        rows += _vision_rows(arch.vision)
        rows.append(Row(EMBEDDING, (HF_EMBEDDING,), vocabulary_layout(arch.vocab)))
    for local, layer in enumerate(chunk.layers):
        rows += layer_rows(arch, local, LAYER.format(layer))
    return rows + end_rows(arch, chunk, HF_EMBEDDING, HF_NORM, HF_HEAD)


def _vision_rows(v: VisionArchitecture) -> list[Row]:
    """Return the rows of the vision tower and its mergers."""
    cube = (v.channels, v.temporal_patch, v.patch, v.patch)
    conv = Layout(lambda t: only(t).flatten(1), lambda whole: [whole.unflatten(1, cube)], axis=None)
    rows = [
        Row("vision.patch_embed.weight", (VISUAL + "patch_embed.proj.weight",), conv),
        Row("vision.patch_embed.bias", (VISUAL + "patch_embed.proj.bias",), COPY),
        Row("vision.positions.weight", (VISUAL + "pos_embed.weight",), COPY),
        *_merger_rows("vision.merger.last.", VISUAL + "merger."),
    ]
    for i in range(len(v.deepstack_layers)):
        names = f"vision.merger.deepstack.{i}.", f"{VISUAL}deepstack_merger_list.{i}."
        rows += _merger_rows(*names)
    for number, blocks in enumerate(segments(v)):
        for local, block in enumerate(blocks):
            names = f"vision.blocks.{number}.layers.{local}.", f"{VISUAL}blocks.{block}."
            rows += _block_rows(v, *names)
    return rows


def _merger_rows(megatron: str, hf: str) -> list[Row]:
    """Return the rows of one merger, by the prefixes of its names."""
    return _copies(megatron, hf, {"norm": "norm", "hidden": "linear_fc1", "out": "linear_fc2"})


def _block_rows(v: VisionArchitecture, megatron: str, hf: str) -> list[Row]:
    """Return the rows of one block of the tower, by the prefixes of its names."""
    qkv = qkv_layout(v.heads, v.heads, fused=True)
    modules = {
        "input_layernorm": "norm1",
        "pre_mlp_layernorm": "norm2",
        "self_attention.linear_proj": "attn.proj",
        "mlp.linear_fc1": "mlp.linear_fc1",
        "mlp.linear_fc2": "mlp.linear_fc2",
    }
    return _copies(megatron, hf, modules) + [
        Row(f"{megatron}self_attention.linear_qkv.{kind}", (f"{hf}attn.qkv.{kind}",), qkv)
        for kind in KINDS
    ]


def _copies(megatron: str, hf: str, modules: dict[str, str]) -> list[Row]:
    """Return the rows of weight and bias of modules that have equal shapes on both sides."""
    return [
        Row(f"{megatron}{ours}.{kind}", (f"{hf}{theirs}.{kind}",), COPY)
        for ours, theirs in modules.items()
        for kind in KINDS
    ]


def _shapes(arch: Architecture) -> dict[str, Shape]:
    """Return tensor shapes by Hugging Face name."""
    shapes = language_shapes(arch, HF_EMBEDDING, HF_NORM, HF_HEAD, LAYER)
    for block in range(arch.vision.layers):
        shapes |= prefixed(f"{VISUAL}blocks.{block}.", _block_shapes(arch.vision))
    return shapes | prefixed(VISUAL, _ends_of_tower(arch))


def _block_shapes(v: VisionArchitecture) -> dict[str, Shape]:
    """Return the shapes of one block of the vision tower, by name within the block."""
    modules: dict[str, Shape] = {
        "norm1": (v.hidden,),
        "attn.qkv": (3 * v.hidden, v.hidden),
        "attn.proj": (v.hidden, v.hidden),
        "norm2": (v.hidden,),
        "mlp.linear_fc1": (v.mlp, v.hidden),
        "mlp.linear_fc2": (v.hidden, v.mlp),
    }
    return _with_biases(modules)


def _ends_of_tower(arch: Architecture) -> dict[str, Shape]:
    """Return the shapes of the patch embedding, the learned positions and the mergers."""
    v = arch.vision
    merged = v.hidden * v.merge**2
    modules: dict[str, Shape] = {
        "patch_embed.proj": (v.hidden, v.channels, v.temporal_patch, v.patch, v.patch)
    }
    mergers = {"merger.": v.hidden}  # prefix -> channels of its norm
    mergers |= {f"deepstack_merger_list.{i}.": merged for i in range(len(v.deepstack_layers))}
    for prefix, normed in mergers.items():
        modules[prefix + "norm"] = (normed,)
        modules[prefix + "linear_fc1"] = (merged, merged)
        modules[prefix + "linear_fc2"] = (arch.hidden, merged)
    return _with_biases(modules) | {"pos_embed.weight": (v.position_grid**2, v.hidden)}


def _with_biases(weights: dict[str, Shape]) -> dict[str, Shape]:
    """Return weight and bias shapes of modules whose bias has the length of the first axis."""
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in weights.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


WEIGHTS = WeightMap(
    rows=_rows,
    shapes=_shapes,
    released_prefixes={
        "language_model.model.": LANGUAGE,
        "language_model.lm_head.": "lm_head.",
        "visual.": VISUAL,
    },
    embedding=HF_EMBEDDING,
    head=HF_HEAD,
    language_matrices=re.compile(r"model\.language_model\.layers\.\d+\..*_proj\.weight"),
)
