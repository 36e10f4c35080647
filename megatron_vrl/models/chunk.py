"""Chunk of a model: consecutive layers of one pipeline stage (`pipeline_split.py` makes them)."""

from dataclasses import dataclass

from megatron_vrl.models.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive layers that one stage computes without communication in between."""

    layers: range  # of the whole model, from 0
    pre_process: bool  # holds the vision tower and the token embedding
    post_process: bool  # holds the final norm and the head


def whole_model(arch: Architecture) -> Chunk:
    """Return the single chunk that holds all layers."""
    return Chunk(range(arch.layers), pre_process=True, post_process=True)
