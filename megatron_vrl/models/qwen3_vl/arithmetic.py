"""Sizes of Qwen3-VL's vision tower for FLOP counts, activation memory and the pipeline split."""

from dataclasses import replace

from megatron_vrl.config import Model
from megatron_vrl.models.activations import Kernels, Layer, tower_block
from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.family import TowerArithmetic


def _tower_weights(vision: VisionArchitecture) -> int:
    """Return the elements of the vision tower without its mergers, which apply to every patch."""
    block = 4 * vision.hidden**2 + 2 * vision.hidden * vision.mlp
    return vision.layers * block + vision.patch_values * vision.hidden


def _merger_weights(arch: Architecture) -> int:
    """Return the elements of all mergers' MLPs, which apply to every vision token."""
    merged = arch.vision.hidden * arch.vision.merge**2
    return (1 + len(arch.vision.deepstack_layers)) * merged * (merged + arch.hidden)


def _attention_pairs(arch: VisionArchitecture, height: int, width: int) -> int:
    """Return the pairs of a temporal step that attend to each other, summed over all blocks."""
    return arch.layers * (height * width) ** 2


def _block(arch: Architecture, model: Model, patches: int, kernels: Kernels) -> Layer:
    """Return the sizes of a block, which has LayerNorm and an MLP without a gate."""
    return replace(tower_block(arch, model, patches, kernels), gated=False, centred=True)


def _merger_saved(arch: Architecture, block: Layer) -> int:
    """Return the bytes that the trained mergers save for the patches of `block`.

    Each merger saves the input and output of its norm, and the input and output of its GELU.
    """
    mergers = 1 + len(arch.vision.deepstack_layers)
    return mergers * (3 * block.number * block.rows * arch.vision.hidden + block.norm_bytes())


TOWER = TowerArithmetic(
    tower_weights=_tower_weights,
    merger_weights=_merger_weights,
    attention_pairs=_attention_pairs,
    block=_block,
    merger_saved=_merger_saved,
)
