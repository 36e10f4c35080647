"""Emulated FP8 weights: language matrices rounded to E4M3 and kept in the trainer's dtype.

One scale per output channel, as vLLM's `fp8_per_channel` uses. vLLM also rounds the activations
of every token; they keep their precision here.
"""

import re
from collections.abc import Iterator

import torch

from megatron_vrl.rollout.buckets import NamedTensors

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def emulate_fp8(
    named_tensors: NamedTensors, matrices: re.Pattern[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in order, with those of names like `matrices` rounded to E4M3."""
    for name, tensor in named_tensors:
        yield name, _round_to_e4m3(tensor) if matrices.fullmatch(name) else tensor


def _round_to_e4m3(weight: torch.Tensor) -> torch.Tensor:
    """Return weight [out, in] rounded with one scale per row, in its own dtype."""
    scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return ((weight / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
