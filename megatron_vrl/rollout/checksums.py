"""SHA-256 of weight tensors, comparable between the trainer and an inference engine.

Both sides hash tensors under HF names in the engine's dtype. Negative zero is hashed as zero,
because reading packed weights back from vLLM loses its sign (`rollout/vllm/live_checksums.py`).
"""

import hashlib

import torch

from megatron_vrl.rollout.buckets import NamedTensors
from megatron_vrl.rollout.interfaces import Checksums


def tensor_checksums(named_tensors: NamedTensors, dtype: torch.dtype) -> Checksums:
    """Return SHA-256 by name of each tensor after a cast to `dtype`."""
    return {name: _digest(tensor.detach(), dtype) for name, tensor in named_tensors}


def _digest(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    plain = (tensor.to(device="cpu", dtype=dtype) + 0.0).contiguous()
    return hashlib.sha256(plain.view(-1).view(torch.uint8).numpy().data).hexdigest()
