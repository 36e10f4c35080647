"""Shapes of the Hugging Face tensors that all families share: embedding, language layers, head."""

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.family import Shape


def language_shapes(
    arch: Architecture, embedding: str, norm: str, head: str, layer: str
) -> dict[str, Shape]:
    """Return the shapes of the language model's tensors by the given Hugging Face names.

    `layer` is the prefix of a layer with "{}" for its number.
    """
    shapes: dict[str, Shape] = {embedding: (arch.vocab, arch.hidden), norm: (arch.hidden,)}
    if not arch.tied_head:
        shapes[head] = (arch.vocab, arch.hidden)
    for number in range(arch.layers):
        shapes |= prefixed(layer.format(number), _layer_shapes(arch))
    return shapes


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
        if arch.qkv_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if arch.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (arch.head_dim,) for name in "qk"}
    return shapes


def linear_shapes(linears: dict[str, tuple[int, int]]) -> dict[str, Shape]:
    """Return weight and bias shapes of linear layers with (output, input) sizes."""
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in linears.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def prefixed(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Return `shapes` with `prefix` before each name."""
    return {prefix + name: shape for name, shape in shapes.items()}
