"""Qwen2.5-VL: 3B, 7B, 32B and 72B."""

from typing import TYPE_CHECKING

from megatron_vrl.models.family import Family
from megatron_vrl.models.qwen2_5_vl.arithmetic import TOWER
from megatron_vrl.models.qwen2_5_vl.config import parse_config
from megatron_vrl.models.qwen2_5_vl.engine import ENGINE
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.models.qwen2_5_vl.prompt import INTERLEAVED_PROMPT, PROMPT
from megatron_vrl.models.qwen2_5_vl.weight_map import WEIGHTS

if TYPE_CHECKING:
    from megatron_vrl.models.model_parts import ModelParts


def _parts() -> "ModelParts":
    """Import and return the modules of the model."""
    from megatron_vrl.models.layers import layer_spec
    from megatron_vrl.models.model_parts import ModelParts
    from megatron_vrl.models.qwen2_5_vl.vision import Qwen25VisionTower, tower_inputs

    return ModelParts(
        tower=Qwen25VisionTower, vision_inputs=tower_inputs, language_layer=layer_spec
    )


FAMILY = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    parse_config=parse_config,
    pixels=PIXELS,
    prompt=PROMPT,
    interleaved_prompt=INTERLEAVED_PROMPT,
    engine=ENGINE,
    weights=WEIGHTS,
    tower=TOWER,
    parts=_parts,
)
