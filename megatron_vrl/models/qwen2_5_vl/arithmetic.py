"""Sizes of Qwen2.5-VL's vision tower for FLOP counts, activation memory and the pipeline split."""

from megatron_vrl.models.activations import Layer, tower_block
from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.family import TowerArithmetic


def _tower_weights(vision: VisionArchitecture) -> int:
    """Return the elements of the vision tower without its merger, which apply to every patch."""
    block = 4 * vision.hidden**2 + 3 * vision.hidden * vision.mlp
    return vision.layers * block + vision.patch_values * vision.hidden


def _merger_weights(arch: Architecture) -> int:
    """Return the elements of the merger's MLP, which apply to every vision token."""
    merged = arch.vision.hidden * arch.vision.merge**2
    return merged * (merged + arch.hidden)


def _attention_pairs(arch: VisionArchitecture, height: int, width: int) -> int:
    """Return the pairs of a temporal step that attend to each other, summed over all blocks."""
    full = len(arch.full_attention_layers)
    windows = (arch.layers - full) * _window_pairs(height, width, arch)
    return full * (height * width) ** 2 + windows


def _window_pairs(height: int, width: int, arch: VisionArchitecture) -> int:
    """Return the pairs inside the windows of a temporal step. Windows at the edges may be
    smaller."""
    side = arch.window // arch.merge // arch.patch * arch.merge  # patches per side of a window
    squares = [
        length // side * side**2 + (length % side) ** 2 for length in (height, width)
    ]  # a window's pairs are its height squared times its width squared
    return squares[0] * squares[1]


def _merger_saved(arch: Architecture, block: Layer) -> int:
    """Return the bytes that the trained merger saves for the patches of `block`."""
    patch_channels = block.number * block.rows * arch.vision.hidden
    # output of the norm; input and output of the GELU
    return 3 * patch_channels + block.norm_bytes()


TOWER = TowerArithmetic(
    tower_weights=_tower_weights,
    merger_weights=_merger_weights,
    attention_pairs=_attention_pairs,
    block=tower_block,
    merger_saved=_merger_saved,
)
