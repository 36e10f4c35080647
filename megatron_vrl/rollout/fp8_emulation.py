"""Weights as an FP8 engine has them, in the trainer's type: the matrices of the language layers
rounded to E4M3, one scale for each output channel (vLLM's `fp8_per_channel`, which also rounds
activations, token by token; they are left as they are here)."""

import re
from collections.abc import Iterator

import torch

from megatron_vrl.rollout.buckets import NamedTensors

MATRICES = re.compile(r"model\.layers\.\d+\..*_proj\.weight")  # published names
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(named_tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named_tensors:
        yield name, _rounded(tensor) if MATRICES.fullmatch(name) else tensor


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in]."""
    scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return ((weight / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
