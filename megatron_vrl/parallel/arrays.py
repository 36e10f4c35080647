"""Tensors as arrays that can be kept, pickled and sent, and back. NumPy has no bfloat16: its bits
travel as uint16."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_array(tensor: Tensor) -> NDArray[Any]:
    host = tensor.detach().cpu().contiguous()
    bits = host.view(torch.uint16) if host.dtype == torch.bfloat16 else host
    array: NDArray[Any] = bits.numpy()
    return array


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
