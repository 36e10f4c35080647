"""Tensors as NumPy arrays and back, without loss. NumPy has no bfloat16, so uint16 carries its
bits."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return `tensor` on the host as an array; a bfloat16 tensor becomes uint16 with the same
    bits."""
    host = tensor.detach().cpu().contiguous()
    bits = host.view(torch.uint16) if host.dtype == torch.bfloat16 else host
    array: NDArray[Any] = bits.numpy()
    return array


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Return a tensor that shares the array's memory; uint16 becomes bfloat16 with the same
    bits."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
