"""Dense Qwen3-VL: 2B, 4B, 8B and 32B."""

from typing import TYPE_CHECKING

from megatron_vrl.models.family import Family
from megatron_vrl.models.qwen3_vl.arithmetic import TOWER
from megatron_vrl.models.qwen3_vl.config import parse_config
from megatron_vrl.models.qwen3_vl.engine import ENGINE
from megatron_vrl.models.qwen3_vl.pixels import PIXELS
from megatron_vrl.models.qwen3_vl.prompt import PROMPT
from megatron_vrl.models.qwen3_vl.weight_map import WEIGHTS

if TYPE_CHECKING:
    from megatron_vrl.models.model_parts import ModelParts


def _parts() -> "ModelParts":
    """Import and return the modules of the model."""
    from megatron_vrl.models.model_parts import ModelParts
    from megatron_vrl.models.qwen3_vl.deepstack import language_layer
    from megatron_vrl.models.qwen3_vl.rotary import InterleavedAngles
    from megatron_vrl.models.qwen3_vl.vision import Qwen3VisionTower
    from megatron_vrl.models.qwen3_vl.vision_inputs import tower_inputs

    return ModelParts(
        tower=Qwen3VisionTower,
        vision_inputs=tower_inputs,
        language_layer=language_layer,
        rotary_angles=InterleavedAngles,
    )


FAMILY = Family(
    name="qwen3_vl",
    title="Qwen3-VL",
    parse_config=parse_config,
    pixels=PIXELS,
    prompt=PROMPT,
    interleaved_prompt=PROMPT,  # it has timestamps
    engine=ENGINE,
    weights=WEIGHTS,
    tower=TOWER,
    parts=_parts,
)
