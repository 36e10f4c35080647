"""vLLM inside a process that it does not own.

vLLM reads environment variables when it is imported. When an engine starts, vLLM also seeds every
random generator, replaces torch.set_num_threads by a stub and rewrites variables of the launcher
(LOCAL_WORLD_SIZE, LD_PRELOAD). `preserve_trainer_state` undoes these changes. Two of vLLM's changes
stay: gc.freeze() of the objects alive at the start, and a default process group of this single
process if none existed.
"""

import importlib.util
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import torch

from megatron_vrl.errors import RolloutError
from megatron_vrl.models.family import EngineInputs
from megatron_vrl.rollout.vllm.compat import check_private_parts, set_environment
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops


def import_vllm() -> ModuleType:
    """Import vLLM (8 to 10 s the first time) and register this package's weight transfer.

    Raises RolloutError if vLLM is not installed or lacks a private part that is used here.
    """
    if importlib.util.find_spec("vllm") is None:
        raise RolloutError(
            "vLLM is not installed; install megatron_vrl[gpu], or megatron_vrl[cpu] without a GPU."
        )
    set_environment()
    declare_missing_ops()
    with preserve_trainer_state():
        import vllm

        check_private_parts()
        from megatron_vrl.rollout.vllm.load_weights import register

        register()
    return vllm


def register_model(vllm: ModuleType, inputs: EngineInputs) -> None:
    """Register vLLM's class of a model family.

    The class and not its name: vLLM inspects a name in a subprocess that imports all of vLLM again
    (10 s) and lacks the torchvision shim.
    """
    module, _, name = inputs.model_class.partition(":")
    with preserve_trainer_state():
        vllm.ModelRegistry.register_model(name, getattr(import_module(module), name))


@contextmanager
def preserve_trainer_state() -> Iterator[None]:
    """Restore the trainer's random states, threads, default dtype and environment afterwards.

    `run.deterministic` holds for the trainer alone: inside, deterministic algorithms are off. An
    engine has operations without such a form, and torch fills its empty tensors with NaN.
    """
    environment = dict(os.environ)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    default_dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # vLLM uses old torch names
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != num_threads:
                torch.set_num_threads(num_threads)
            torch.set_default_dtype(default_dtype)
            _restore(environment)


def _restore(environment: dict[str, str]) -> None:
    """Restore the environment, but keep vLLM's own variables."""
    for name in os.environ.keys() - environment.keys():
        if not name.startswith("VLLM_"):
            del os.environ[name]
    os.environ.update(environment)
