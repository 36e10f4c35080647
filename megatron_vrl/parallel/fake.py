"""Fake platform: one rank of a layout on a fake GPU, where nothing is computed.

Tensors are torch's fake tensors on `cuda:0`: they have shape, dtype and device, and no memory.
Process groups are torch's `fake` backend: a collective returns at once. Objects that ranks
exchange are this rank's own, so all ranks must have equal groups. `fake_rank` replaces exactly the
attributes of `_patches`, which need a GPU or a second process, and restores them at its end. The
process must have loaded `process/fake_gpu.py` first.

Nothing is compiled. A function that torch.compile makes one kernel of is one operation here, with
the output's shape.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.tensor_parallel import random as mcore_random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from megatron_vrl.config import Parallel
from megatron_vrl.parallel import adamw, arrays, mesh
from megatron_vrl.parallel.cpu import CpuRngTracker
from megatron_vrl.parallel.mesh import Mesh, init_mesh

DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_rank(
    cfg: Parallel,
    rank: int,
    world: int,
    fp8: str,
    on_host: Sequence[tuple[Any, str]] = (),
    compiled: Sequence[tuple[Any, str, Callable[..., Any]]] = (),
) -> Iterator[Mesh]:
    """Context manager that returns the mesh of `rank` among `world` fake ranks.

    Tensors made in the block are fake. fp8: `model.fp8`. `on_host` names functions, as (module,
    name), that compute on the host by torch: they get real tensors. `compiled` names functions that
    torch.compile makes one kernel of, as (module, name, replacement).
    """
    with ExitStack() as stack:
        environment = {"WORLD_SIZE": str(world), "RANK": str(rank)}
        for name, value in environment.items():
            stack.callback(_restore, name, os.environ.get(name))
            os.environ[name] = value
        real = [(owner, name, _with_real_tensors(getattr(owner, name))) for owner, name in on_host]
        for owner, name, replacement in [*_patches(), *real, *compiled]:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        store: Any = FakeStore()
        dist.init_process_group("fake", store=store, rank=rank, world_size=world)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        made = init_mesh(cfg, seed=1, fp8=fp8)
        stack.callback(parallel_state.destroy_model_parallel)
        yield made


def _restore(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


def _patches() -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, replacement) of everything that needs a GPU or another process."""
    return [
        (mesh, "_init_device", _init_device),
        (arrays, "pinned", arrays.as_tensor),
        (torch.cuda, "current_device", lambda: DEVICE),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "current_stream", lambda device=None: None),  # megatron.core 0.19.2
        (torch.Tensor, "cuda", lambda self, *a, **k: self.to(DEVICE)),
        (torch.nn.Module, "to", _converted),
        (dist, "new_group", _fake_backend(dist.new_group)),
        (dist, "all_gather_object", _gathered),
        (dist, "broadcast_object_list", lambda *a, **k: None),
        (fused_bias_swiglu, "swiglu", lambda y: y.chunk(2, -1)[0].clone()),
        (fused_bias_swiglu, "swiglu_back", lambda g, y: y.clone()),
        (mcore_random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state()),
        (mcore_random, "_set_cuda_rng_state", lambda *a, **k: None),
        (mcore_random, "_CUDA_RNG_STATE_TRACKER", CpuRngTracker()),
        (mcore_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
    ]


def _init_device() -> torch.device:
    adamw.install()
    return DEVICE


def _fake_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """Return `new_group` for the default backend, where Megatron asks for gloo."""
    return lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": None})


def _with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` called outside all dispatch modes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _gathered(values: list[Any], value: Any, group: Any = None) -> None:
    """Fill `values` with this rank's value."""
    values[:] = [value] * len(values)


def _converted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Return the module with parameters of another dtype or device, as `Module.to` does.

    torch cannot exchange the data of a fake parameter, so a new one takes its place. A parameter
    that two modules share stays one parameter, with the attributes that Megatron sets.
    """
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    made: dict[int, torch.nn.Parameter] = {}
    replaced = []  # kept alive, so that no other parameter gets the id of one
    for owner in module.modules():
        for name, old in owner._parameters.items():
            if old is None or (dtype in (None, old.dtype) and device in (None, old.device)):
                continue
            if id(old) not in made:
                data = old.detach().to(device=device, dtype=dtype)
                new = torch.nn.Parameter(data, requires_grad=old.requires_grad)
                new.__dict__ = old.__dict__ | new.__dict__  # a fake tensor keeps its device there
                made[id(old)] = new
                replaced.append(old)
            owner._parameters[name] = made[id(old)]
        for name, kept in owner._buffers.items():
            if kept is not None:
                floats = dtype if kept.is_floating_point() else None
                owner._buffers[name] = kept.to(device=device, dtype=floats)
    return module
