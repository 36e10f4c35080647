"""Whether weight gradients are added up inside their products, by NVIDIA apex where that is here.

Megatron's data-parallel wrapper keeps each gradient in a float32 buffer, `main_grad`, which a fused
product writes to; without it the product's result is added to the buffer in a second pass. Probed
is the extension, never `import apex`: PyPI's apex is another project. Nothing of Megatron is
imported here, for a dry run asks too.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from megatron_vrl.config import Model

FUSED_GRADIENT = "fused_weight_gradient_mlp_cuda"


class GradientFusion(NamedTuple):
    on: bool
    words: str  # for a run's summary


def importable(name: str) -> bool:
    """An extension that was built for another torch is found and cannot be loaded."""
    if find_spec(name) is None:
        return False
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def gradient_fusion(
    cfg: Model, on_gpu: bool, probe: Callable[[str], bool] = importable
) -> GradientFusion:
    """Whether a weight's gradient is added to Megatron's float32 `main_grad` inside its product.

    Megatron's linear layers do it with apex's extension, Transformer Engine's by themselves; but
    the head of a model with those is still Megatron's and refuses to be built without apex's.
    """
    if cfg.gradient_accumulation_fusion == "none":
        return GradientFusion(False, "off (model.gradient_accumulation_fusion=none)")
    if cfg.layers == "fp8_emulated":
        why = "off (model.layers=fp8_emulated has matrix products of its own)"
        return GradientFusion(False, why)
    if not on_gpu:
        return GradientFusion(False, "off (no GPU)")
    if not probe(FUSED_GRADIENT):
        return GradientFusion(False, f"off (NVIDIA apex's {FUSED_GRADIENT} is not here)")
    return GradientFusion(True, f"on (NVIDIA apex's {FUSED_GRADIENT})")
