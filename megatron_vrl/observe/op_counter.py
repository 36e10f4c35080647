"""Counter of the operations that torch dispatches, with bytes moved and host reads.

A host read is an operation whose result the host must know before it can go on: `item`, `tolist`,
a boolean index. On a GPU each one waits until all queued work is done. The counter sees them on a
CPU too, where they cost nothing, so a CPU test can hold a GPU pass free of them.

Left out: views, and allocations without a kernel. A fused kernel counts as one operation.
"""

import collections
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = frozenset(  # operations of ATen that launch nothing
    [
        "view",
        "_unsafe_view",
        "as_strided",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "squeeze",
        "unsqueeze",
        "expand",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "reshape",
        "lift_fresh",
        "_reshape_alias",
        "view_as",
        "unfold",
        "diagonal",
        "narrow",
        "is_same_size",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "set_",
        "resize_",
        "_has_compatible_shallow_copy_type",
        "is_pinned",
    ]
)
READS = frozenset(  # operations of ATen whose result, or its shape, the host must know
    [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "unique_dim",
        "_unique2",
        "unique_consecutive",
    ]
)
HOST_CALLS = frozenset(["tolist", "numpy", "cpu"])  # the others are _local_scalar_dense
UPLOADS = frozenset(["tensor", "as_tensor"])


class OpCounter:
    """Context manager that counts what torch does inside its block.

    Collectives are operations of their own namespace and are left out.
    """

    def __init__(self) -> None:
        self.operations: collections.Counter[str] = collections.Counter()  # by name of ATen
        self.bytes_moved = 0  # of the tensors that operations read and write
        self.host_reads: collections.Counter[str] = collections.Counter()  # by line of code
        self.uploads: collections.Counter[str] = collections.Counter()  # host arrays made tensors
        self._stack = ExitStack()

    @property
    def total(self) -> int:
        """Return the number of operations."""
        return sum(self.operations.values())

    def __enter__(self) -> "OpCounter":
        self._stack.callback(setattr, torch, "from_numpy", torch.from_numpy)
        torch.from_numpy = self._noting(torch.from_numpy)  # no mode of torch sees it
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Dispatch(self))
        return self

    def _noting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(array: Any) -> Tensor:
            self.uploads[caller("from_numpy")] += 1
            return function(array)

        return call

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


class _Functions(TorchFunctionMode):
    """Mode that notes calls of HOST_CALLS and UPLOADS, most of which never reach the dispatcher."""

    def __init__(self, counter: OpCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in HOST_CALLS:
            self._counter.host_reads[caller(name)] += 1
        elif name in UPLOADS:
            self._counter.uploads[caller(name)] += 1
        return function(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    """Mode that counts operations, their bytes, and results whose shape depends on values."""

    def __init__(self, counter: OpCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if space == "c10d" or name in FREE:
            return out
        if reads_host(name, args):
            self._counter.host_reads[caller(name)] += 1
        self._counter.operations[name] += 1
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        self._counter.bytes_moved += sum(t.numel() * t.element_size() for t in tensors.values())
        return out


def reads_host(name: str, args: Any) -> bool:
    """Return whether the host must wait for the result of the operation, or for its shape.

    A boolean index does so, except where a number is assigned: torch then calls `masked_fill_`
    (aten/src/ATen/native/TensorAdvancedIndexing.cpp, canDispatchToMaskedFill).
    """
    if name not in ("index", "index_put_"):
        return name in READS
    if name == "index_put_" and args[2].ndim == 0 and args[2].device.type == "cpu":
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1]))


def caller(name: str, besides: str = __file__) -> str:
    """Return `name` with file and line of the innermost frame outside torch and `besides`."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename not in (__file__, besides):
            return f"{name} at {frame.filename.split('site-packages/')[-1]}:{frame.lineno}"
    return name
