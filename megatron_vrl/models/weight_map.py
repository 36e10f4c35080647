"""Weight map of a model: its rows and tensor shapes, by its family.

Checkpoint conversion, checkpoint loading and weight sync to vLLM use it. Conversion compares the
shapes with the file before it reads or writes a tensor. A checkpoint of another model is refused
with the name of the first tensor that differs.
"""

from math import prod

import torch

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import Shape
from megatron_vrl.models.fusion import parameter_name
from megatron_vrl.models.weight_layouts import Row


def chunk_rows(arch: Architecture, chunk: Chunk) -> list[Row]:
    """Return the rows of every parameter of one chunk; `pipeline_split.whole_model` is the whole
    model."""
    return family_of(arch).weights.rows(arch, chunk)


def parameters_by_row(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a chunk by `Row.megatron`, those of adapters too."""
    return {parameter_name(name): parameter for name, parameter in model.named_parameters()}


def hf_shapes(arch: Architecture) -> dict[str, Shape]:
    """Return tensor shapes by Hugging Face name. A tied head has no tensor of its own."""
    return family_of(arch).weights.shapes(arch)


def num_parameters(arch: Architecture) -> int:
    """Return the exact number of trainable parameters; a tied head counts once."""
    return sum(prod(shape) for shape in hf_shapes(arch).values())


def megatron_shape(row: Row, shapes_by_name: dict[str, Shape]) -> Shape:
    """Return the shape of the whole Megatron parameter of `row`, without vocabulary padding."""
    parts = [torch.empty(shapes_by_name[name], device="meta") for name in row.hf_names]
    return tuple(row.layout.join(parts).shape)
