"""Interleaved M-RoPE of Qwen3-VL: rotary angles from positions on three axes.

The pairs of channels take turns: pairs 1, 4, 7, ... rotate by the height, pairs 2, 5, 8, ... by the
width, and all others by the time, until height and width have as many pairs as `mrope_section`
says. Qwen2.5-VL gives each axis one contiguous range of pairs instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vrl.models.architecture import Architecture


class InterleavedAngles(torch.nn.Module):
    """Rotary embedding module of GPTModel: positions [3, 1, L] -> angles [L, 1, 1, D]."""

    def __init__(self, arch: Architecture, device: torch.device) -> None:
        super().__init__()
        pairs = torch.arange(0, arch.head_dim, 2, dtype=torch.float32)
        # Plain attributes: the cast of the model to its dtype must not round them.
        self.frequency = (1.0 / arch.rope_base ** (pairs / arch.head_dim)).to(device)
        self.axis = torch.tensor(axis_of_pairs(arch.mrope_section), device=device)

    def forward(self, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return float32 angles [L, 1, 1, D] of M-RoPE positions [3, 1, L]."""
        chosen = positions[:, 0].index_select(0, self.axis)  # [D / 2, L]
        half = chosen.t().float() * self.frequency
        return torch.cat([half, half], dim=-1)[:, None, None]


def axis_of_pairs(section: Sequence[int]) -> list[int]:
    """Return the axis (0 time, 1 height, 2 width) that rotates each pair of channels.

    Example: sections (4, 2, 2) give [0, 1, 2, 0, 1, 2, 0, 0].
    """
    axes = [0] * sum(section)
    for axis in (1, 2):
        for pair in range(axis, 3 * section[axis], 3):
            axes[pair] = axis
    return axes
