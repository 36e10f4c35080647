"""CPU platform: patches that run megatron.core on a machine without a GPU.

megatron.core hard-codes CUDA in a few dozen places (`device="cuda"`, `Tensor.cuda()`, the
CUDA random state). `install()` replaces exactly the attributes in `PATCHES`, once per process and
before a model is built. `uninstall()` restores the originals. On a machine with a GPU `install()`
raises ConfigError, so no patch can reach a production run. 0.16.1 needs every row but those that
name a newer release; 0.19.2 needs them all.

Not patched, because no run uses them here: streams and events (offloading, CUDA graphs), the fp16
gradient scaler, MoE fusions, Megatron's own inference.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as mcore_random
from torch.utils._device import _device_constructors

from megatron_vrl.errors import ConfigError


class CpuRngTracker(mcore_random.CudaRNGStatesTracker):
    """Megatron's tracker of named random states, on the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        """Add the state `name` with `seed`. Raise ValueError if either is already in use."""
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} or seed {seed} is already there")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Context manager that uses the random state `name` and stores its new value at the end."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the tensor factory with device="cuda*" replaced by "cpu" and pin_memory ignored."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


_type = torch.Tensor.type


def _tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return `tensor.type()`; callers in megatron.core get the CUDA spelling that they compare
    with."""
    name = _type(self, *args, **kwargs)
    if args or kwargs or not _called_from_megatron():
        return name
    return name.replace("torch.", "torch.cuda.", 1)


def _called_from_megatron() -> bool:
    """Return whether the caller of the calling function is in megatron.core."""
    import sys

    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


# (owner, attribute, replacement, code that needs it)
PATCHES: tuple[tuple[Any, str, Any, str], ...] = (
    (torch.cuda, "current_device", lambda: torch.device("cpu"), "buffers, rotary embedding, p2p"),
    (torch.cuda, "synchronize", lambda device=None: None, "p2p_communication, timers"),
    (torch.cuda, "current_stream", lambda device=None: None, "gradient buffers (0.19.2)"),
    (torch.Tensor, "cuda", lambda self, *a, **k: self, "tied embeddings, rope, checkpoints"),
    (torch, "tensor", _on_cpu(torch.tensor), "schedules, clip_grads"),
    (torch, "zeros", _on_cpu(torch.zeros), "schedules, clip_grads"),
    (torch, "ones", _on_cpu(torch.ones), "schedules"),
    (torch, "empty", _on_cpu(torch.empty), "p2p_communication, gradient buffers"),
    (torch, "empty_like", _on_cpu(torch.empty_like), "distributed optimizer"),
    (torch.Tensor, "type", _tensor_type, "optimizer, clip_grads"),
    (mcore_random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state(), "recompute"),
    (
        mcore_random,
        "_set_cuda_rng_state",
        lambda state, *a, **k: torch.set_rng_state(state),
        "recompute",
    ),
    (mcore_random, "_CUDA_RNG_STATE_TRACKER", CpuRngTracker(), "seeding"),
    (mcore_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True, "seeding"),
)

_originals: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Replace the attributes of PATCHES. Calling it twice is harmless."""
    if torch.cuda.is_available():
        raise ConfigError("The CPU platform is not for machines with a GPU: run without it.")
    if not _originals:
        _device_constructors()  # cached: `torch.device("meta")` knows the factories by identity
        _originals.extend(_current(PATCHES))
        for owner, attribute, replacement, _ in PATCHES:
            setattr(owner, attribute, replacement)


def uninstall() -> None:
    """Put the originals back (for tests)."""
    while _originals:
        owner, attribute, original = _originals.pop()
        setattr(owner, attribute, original)


def _current(patches: Iterable[tuple[Any, str, Any, str]]) -> list[tuple[Any, str, Any]]:
    """Return the present values of the patched attributes."""
    return [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _, _ in patches]
