"""What it takes to have vLLM inside a trainer process, in one place.

vLLM expects to own its process. It reads environment variables when it is imported; when an
engine starts it also seeds every random generator, exchanges torch.set_num_threads for a stub
and rewrites variables of the launcher (LOCAL_WORLD_SIZE, LD_PRELOAD). `trainer_state_kept` puts
these back. It leaves two things as vLLM wants them: gc.freeze() of the objects alive at the start,
and, only if nobody made one before, a default process group of this single process.
"""

import importlib.util
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops

REQUIRED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would move the trainer's threads too
}
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its CPU warnings concern a process of its own
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # checkpoints are directories here
}


def import_vllm() -> ModuleType:
    """Set the environment, then import vLLM (8 - 10 s the first time) and add our backend."""
    if importlib.util.find_spec("vllm") is None:
        raise RolloutError(
            "vLLM is not installed; install megatron_vrl[gpu], or megatron_vrl[cpu] without a GPU."
        )
    os.environ.update(REQUIRED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    declare_missing_ops()
    with trainer_state_kept():
        import vllm
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

        from megatron_vrl.rollout.vllm.load_weights import register

        register()
        # As a class, not by name: a name is looked into by a subprocess that imports all of
        # vLLM again (10 s) and lacks the torchvision shim.
        architecture = Qwen2_5_VLForConditionalGeneration.__name__
        vllm.ModelRegistry.register_model(architecture, Qwen2_5_VLForConditionalGeneration)
    return vllm


@contextmanager
def trainer_state_kept(seed: int | None = None) -> Iterator[None]:
    """Give back the trainer's random states, threads, default dtype and environment afterwards.

    With a seed, the body starts from generators seeded with it. vLLM draws its samples from the
    process-wide generators, so this makes a call repeatable at no cost per request.
    """
    environment = dict(os.environ)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    default_dtype = torch.get_default_dtype()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # vLLM's own use of old torch names
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != num_threads:
                torch.set_num_threads(num_threads)
            torch.set_default_dtype(default_dtype)
            _restore(environment)


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        if not name.startswith("VLLM_"):
            del os.environ[name]
    os.environ.update(environment)
