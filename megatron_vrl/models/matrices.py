"""Number of elements of the weight matrices, for FLOP counts and the pipeline split.

A matrix product takes one multiply-add per element of its weight and row of its input. Biases,
norms and the token embedding (a look-up) are not matrix products and are left out. `num_parameters`
of `weight_map.py` counts them. The vision tower's are its family's (`Family.tower`).
"""

from megatron_vrl.models.architecture import Architecture


def language_layer_weights(arch: Architecture) -> int:
    """Return the elements of one language layer: q and o, k and v, and the gated MLP."""
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return arch.hidden * (2 * queries + 2 * keys + 3 * arch.mlp)


def head_weights(arch: Architecture) -> int:
    """Return the elements of the output layer, without vocabulary padding."""
    return arch.hidden * arch.vocab
