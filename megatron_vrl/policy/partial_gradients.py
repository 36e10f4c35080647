"""Gradients that are partial sums on each tensor-parallel rank and that Megatron does not sum."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.parallel.mesh import Axis


def sum_partial_gradients(chunks: Sequence[VisionLanguageModel], tensor: Axis) -> None:
    """Sum partial gradients over the tensor-parallel ranks, in one all-reduce.

    They are those of the vision tower, since each rank encodes other temporal steps, and those of
    some factors of adapters (`models/lora.py`).
    """
    if tensor.size == 1:
        return
    grads: list[torch.Tensor] = [
        param.main_grad
        for chunk in chunks
        for name, param in chunk.named_parameters()
        if param.requires_grad
        and (name.startswith("vision.") or getattr(param, "partial_over_tensor", False))
    ]
    if grads:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=tensor.group)
        for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
