"""Modules of a family's model, which `VisionLanguageModel` puts together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vrl.config import Model
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.layers import LayerModules
from megatron_vrl.models.vision_inputs import MakeVisionInputs
from megatron_vrl.models.vision_tower import VisionTower
from megatron_vrl.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """Vision tower, and what differs between the language models of families."""

    tower: Callable[[Architecture, Model, Mesh, TransformerConfig], VisionTower]
    """Build the tower; the last argument is the language model's config."""
    vision_inputs: MakeVisionInputs
    language_layer: Callable[[LayerModules], ModuleSpec]
    """Return the spec of a language layer of the given modules."""
    rotary_angles: Callable[[Architecture, torch.device], torch.nn.Module] | None = None
    """Build a module with the interface of Megatron's rotary embedding; None: M-RoPE in sections
    (Megatron's MultimodalRotaryEmbedding)."""
