"""Number of elements of Qwen2.5-VL's weight matrices, for FLOP counts and the pipeline split.

A matrix product takes one multiply-add per element of its weight and row of its input. Biases,
norms and the token embedding (a look-up) are not matrix products and are left out. `num_parameters`
of `hf_shapes.py` counts them.
"""

from megatron_vrl.models.architecture import Architecture, VisionArchitecture


def language_layer_weights(arch: Architecture) -> int:
    """Return the elements of one language layer: q and o, k and v, and the gated MLP."""
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return arch.hidden * (2 * queries + 2 * keys + 3 * arch.mlp)


def head_weights(arch: Architecture) -> int:
    """Return the elements of the output layer, without vocabulary padding."""
    return arch.hidden * arch.vocab


def tower_weights(vision: VisionArchitecture) -> int:
    """Return the elements of the vision tower without its merger, which apply to every patch."""
    block = 4 * vision.hidden**2 + 3 * vision.hidden * vision.mlp
    return vision.layers * block + vision.patch_values * vision.hidden


def merger_weights(arch: Architecture) -> int:
    """Return the elements of the merger's MLP, which apply to every vision token."""
    merged = arch.vision.hidden * arch.vision.merge**2
    return merged * (merged + arch.hidden)
