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


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return `as_tensor` of the array on `device`.

    The copy to a GPU is from pinned memory, and the host does not wait for it.
    """
    if device.type != "cuda":
        return as_tensor(array if array.flags.writeable else array.copy()).to(device)
    return pinned(array).to(device, non_blocking=True)


def pinned(array: NDArray[Any]) -> Tensor:
    """Return `as_tensor` of a copy of the array in pinned memory."""
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    copy = torch.empty(array.shape, dtype=kind, pin_memory=True)
    np.copyto(copy.numpy(), array)
    return copy.view(torch.bfloat16) if array.dtype == np.uint16 else copy
