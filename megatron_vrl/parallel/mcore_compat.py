"""Differences between the supported releases of megatron.core, 0.16 to 0.19.

Every other module is the same code for all of them. A line here says at which release the
difference was seen. Releases from 0.17 on have wheels for Python 3.12 and newer only.

`GPTModel` logs from 0.19 on that it gets bug fixes only. Its successor `HybridModel` has no
counterpart in 0.16, so the model stays a `GPTModel` (`models/vision_language_model.py`).
"""

from functools import partial
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.package_info import MAJOR, MINOR
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

RELEASE = (MAJOR, MINOR)

# Arguments of `dist_checkpointing.save`. 0.17.1 to 0.19.2 write by `nvidia-resiliency-ext` unless
# told otherwise, which is compiled for CUDA and copies tensors to pinned memory first.
SAVE: dict[str, Any] = {"async_strategy": "mcore"} if RELEASE >= (0, 17) else {}


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """Return what `TransformerLayerSubmodules.mlp` takes for an MLP of `submodules`.

    0.18.2 and 0.19.2 take a callable, and log a warning for each layer about a spec.
    """
    if RELEASE >= (0, 18):
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Return the gradients of one optimizer whose norm is taken, each parameter on one rank only.

    0.19.2 renamed the method.
    """
    if RELEASE >= (0, 19):
        return list(optimizer.get_grads_for_grad_norm())
    return list(optimizer.get_main_grads_for_grad_norm())
