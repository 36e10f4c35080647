"""Recompute of activations: Megatron's settings for `model.recompute*`, and the layers they cover.

Levels of the language model, by falling memory: none; selective (core attention); full with
`model.recompute_num_layers` (the first layers of each chunk, Megatron's method `block`); full.
"""

from collections.abc import Sequence
from typing import Any

from megatron_vrl.config import Model
from megatron_vrl.errors import ConfigError


def check_recompute(cfg: Model) -> None:
    """Raise ConfigError if `model.recompute_num_layers` is set without full recompute."""
    if cfg.recompute_num_layers and cfg.recompute != "full":
        raise ConfigError(
            f"model.recompute_num_layers={cfg.recompute_num_layers} counts layers that are "
            f"recomputed in full, but model.recompute={cfg.recompute}: set model.recompute=full, "
            "or leave model.recompute_num_layers out."
        )


def language_recompute(cfg: Model, layers: int) -> dict[str, Any]:
    """Return the TransformerConfig fields of the language model, which has `layers` layers."""
    if cfg.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return _block(cfg.recompute_num_layers or layers) if cfg.recompute == "full" else {}


def vision_recompute(cfg: Model, layers: int) -> dict[str, Any]:
    """Return the TransformerConfig fields of the vision tower, which has `layers` layers."""
    return _block(layers) if vision_level(cfg) == "full" else {}


def vision_level(cfg: Model) -> str:
    """Return the recompute of the vision tower. A frozen tower saves nothing to recompute."""
    return "none" if cfg.freeze_vision else cfg.recompute_vision


def layers_in_full(cfg: Model, layers: int) -> int:
    """Return how many of a chunk's `layers` language layers are recomputed in full."""
    if cfg.recompute != "full":
        return 0
    return min(cfg.recompute_num_layers or layers, layers)


def fraction_in_full(cfg: Model, chunks: Sequence[int]) -> float:
    """Return the fraction of the language layers of `chunks` (layers of each) that are recomputed
    in full."""
    return sum(layers_in_full(cfg, layers) for layers in chunks) / sum(chunks)


def recompute_label(cfg: Model) -> str:
    """Return the levels of language model and tower in a few words, for tables."""
    layers = f" {cfg.recompute_num_layers}" if cfg.recompute_num_layers else ""
    tower = f", tower {cfg.recompute_vision}" if not cfg.freeze_vision else ""
    return f"{cfg.recompute}{layers}{tower}"


def _block(layers: int) -> dict[str, Any]:
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": layers,
    }
