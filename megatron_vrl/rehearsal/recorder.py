"""Recorder of a rehearsal: live bytes, operations and collectives of one fake rank.

A host read, an operation that waits until a GPU has finished its queue, ends the rehearsal with
HostReadError if a pass makes it. Outside the passes it is counted, and its result is 1. Live bytes
are those of the storages on the fake GPU. What an allocator or a library adds is left out.
"""

import collections
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vrl.errors import UserError
from megatron_vrl.observe.op_counter import FREE, caller, reads_host

Collective = tuple[str, str, str]  # phase, name of the operation, axis of the group
COLLECTIVES = {  # operation of c10d -> function of torch.distributed without suffix
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "send": "send",
    "recv_": "recv",
}
POINT_TO_POINT = ("send", "recv")


class HostReadError(UserError):
    """A pass reads a value from the GPU."""


class Recorder(TorchDispatchMode):
    """Dispatch mode that records the operations of one rank.

    `phase` and `part` say what the next operations belong to. `in_pass`: whether a host read is an
    error. `axes`: the axis of each process group's name.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.phase, self.part, self.in_pass = "weights", "rest", False
        self.operations: collections.Counter[tuple[str, str]] = collections.Counter()
        self.host_reads: collections.Counter[str] = collections.Counter()  # by phase
        self.calls: collections.Counter[Collective] = collections.Counter()
        self.bytes_sent: collections.Counter[Collective] = collections.Counter()
        self.live = 0  # bytes now
        self.peak: dict[str, int] = {}  # phase -> most bytes in it
        self._axes = axes
        self._sizes: dict[int, int] = {}  # storage -> bytes

    def enter(self, phase: str) -> None:
        """Begin `phase`."""
        self.phase = phase
        self._note_peak()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Context manager: a host read in the block is an error."""
        self.in_pass = True
        try:
            yield
        finally:
            self.in_pass = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.prim.device.default:  # a question, and not an operation
            return args[0].fake_device
        space, name = function._schema.name.split("::")
        if space == "c10d":
            self._collective(name, args)
            if name.endswith("_coalesced_"):  # torch has no fake form of these
                return FakeWork().boxed()
            return function(*args, **(kwargs or {}))
        if reads_host(name, args):
            self._host_read(name)
            if name == "equal":
                return True
            if name == "_local_scalar_dense" and args[0].device.type == "cuda":
                return 1.0 if args[0].dtype.is_floating_point else 1
        out = function(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name not in FREE:
            self.operations[self.phase, self.part] += 1
            if self.in_pass and name in ("_to_copy", "copy_"):
                self._refuse_download(name, args, results)
        for tensor in results:
            if tensor.device.type == "cuda":
                self._hold(tensor)
        return out

    def _host_read(self, name: str) -> None:
        if self.in_pass:
            raise HostReadError(
                f"A pass reads from the GPU: {caller(name, __file__)}; keep the value there."
            )
        self.host_reads[self.phase] += 1

    def _refuse_download(self, name: str, args: Any, results: list[Tensor]) -> None:
        if results[0].device.type == "cpu" and _on_gpu(args):
            raise HostReadError(
                f"A pass copies from the GPU: {caller(name, __file__)}; keep it there."
            )

    def _collective(self, name: str, args: Any) -> None:
        group = next(a for a in tree_leaves(args) if isinstance(a, torch.ScriptObject))
        called = COLLECTIVES.get(name, name)
        axis = self._axes.get(dist.ProcessGroup.unbox(group).group_name, "other")
        # Megatron sends between two stages over the group of all ranks.
        key = (self.phase, called, "pipeline" if called in POINT_TO_POINT else axis)
        self.calls[key] += 1
        self.bytes_sent[key] += max(_bytes(a) for a in args if isinstance(a, Tensor | list))

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            weakref.finalize(storage, self._let_go, key)
            self._note_peak()

    def _let_go(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _note_peak(self) -> None:
        self.peak[self.phase] = max(self.peak.get(self.phase, 0), self.live)


def _on_gpu(args: Any) -> bool:
    return any(isinstance(t, Tensor) and t.device.type == "cuda" for t in tree_leaves(args))


def _bytes(tensors: Any) -> int:
    leaves = [t for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in leaves)
