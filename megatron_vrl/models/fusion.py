"""Fused forms of a layer: gradient accumulation fusion, and norm + linear in one module.

Megatron's data-parallel wrapper keeps each gradient in a float32 buffer, `main_grad`. The fused
kernel of NVIDIA apex writes the product into that buffer; without it a second pass adds the product
to the buffer. This module probes for the extension and never runs `import apex`, because PyPI's
apex is another project. It imports nothing of Megatron, because a dry run uses it too.

Transformer Engine's LayerNormLinear applies a norm and the linear layer after it, and holds both
weights. `parameter_name` returns the name that a parameter has with two modules. Checkpoints and
the weight map use these names.
"""

import copy
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from megatron_vrl.config import Model

FUSED_GRADIENT = "fused_weight_gradient_mlp_cuda"

# Prefixes of parameters of a language layer with norm + linear -> with two modules.
NORM_IN_LINEAR = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def parameter_name(name: str) -> str:
    """Return the name of a parameter in a model whose norms are modules of their own."""
    for fused, own in NORM_IN_LINEAR.items():
        name = name.replace(fused, own)
    return name


class GradientFusion(NamedTuple):
    """Decision on gradient accumulation fusion, with a description for the run's summary."""

    enabled: bool  # for Megatron's layers, and then for all
    description: str  # for the summary of a run
    in_transformer_engine: bool = False  # for Transformer Engine's layers alone


def importable(name: str) -> bool:
    """Return whether the module `name` can be loaded.

    An extension built for another torch version exists and fails to load.
    """
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
    """Return whether weight gradients are added to Megatron's `main_grad` inside their products.

    Megatron's linear layers need apex's extension for it, Transformer Engine's do not. The head and
    the vision tower are always Megatron's.
    """
    if cfg.gradient_accumulation_fusion == "none":
        return GradientFusion(False, "off (model.gradient_accumulation_fusion=none)")
    if cfg.layers == "fp8_emulated":
        why = "off (model.layers=fp8_emulated has its own matrix products)"
        return GradientFusion(False, why)
    if not on_gpu:
        return GradientFusion(False, "off (no GPU)")
    if not probe(FUSED_GRADIENT) and cfg.layers == "transformer_engine":
        return GradientFusion(
            False,
            "on for Transformer Engine's layers, off for the head and the vision tower (NVIDIA "
            f"apex's {FUSED_GRADIENT} is not installed)",
            in_transformer_engine=True,
        )
    if not probe(FUSED_GRADIENT):
        return GradientFusion(False, f"off (NVIDIA apex's {FUSED_GRADIENT} is not installed)")
    return GradientFusion(True, f"on (NVIDIA apex's {FUSED_GRADIENT})")


def with_gradient_fusion(linear: Any) -> Any:
    """Return a subclass of the layer class `linear` whose config has gradient accumulation fusion.

    The model's config stays without it, because Megatron's own layers read the same config.
    """

    class Fused(linear):
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(*args, config=config, **kwargs)

    Fused.__name__ = Fused.__qualname__ = linear.__name__
    return Fused
