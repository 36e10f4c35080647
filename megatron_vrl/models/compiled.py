"""Elementwise functions that torch.compile turns into one kernel on a GPU; elsewhere they run as
written."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def on_gpu(function: Function) -> Function:
    """Return `function`, compiled when its first argument, a tensor, is on a GPU.

    Sizes are symbols, so one compilation serves micro-batches of every size. Nothing is compiled
    before the first call, because torch's compiler takes seconds to load.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def chosen(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (compiled() if first.is_cuda else function)(first, *args, **kwargs)

    return chosen
