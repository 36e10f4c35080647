"""vLLM weight-transfer backend "shared_memory": HF-named weights arrive a bucket at a time.

A bucket is tensors of this very process (a colocated engine) or a piece of another process's
memory (a rollout worker).

The worker half of a weight update: vLLM creates one of these in every worker process and drives
it with start_weight_update, update_weights (once per bucket), finish_weight_update. Where the
kernels multiply with the weights as they are, each tensor is copied once, into its place
(places.py). Where they do not (quantised, or packed for a CPU), vLLM's layer-wise reload collects
a layer's pieces, makes what the kernels want and copies the result over what was there. A bucket
holds whole layers, so nothing of it is needed once it has been loaded. The trainer half is
`rollouts.RolloutManager`.

Engines start with zeros (load format "zeros"), since real weights always arrive by an update.
vLLM's own "dummy" format will not do: it also randomises buffers that no update brings, among
them the pixel mean and deviation of the vision tower (vLLM 0.32.0).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import Bucket, BucketReader, NamedTensors
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops
from megatron_vrl.rollout.vllm.weight_router import WeightRouter

BACKEND = "shared_memory"
LOAD_FORMAT = "zeros"


@functools.cache
def register() -> None:
    """Make both known to this process (entry point `vllm.general_plugins`)."""
    declare_missing_ops()  # for the processes that vLLM starts
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)
    register_model_loader(LOAD_FORMAT)(ZerosLoader)


class ZerosLoader(BaseModelLoader):
    def load_model(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # vLLM has no option for it: with its oneDNN out of sight, CPU kernels take plain weights.
        options: Any = vllm_config.additional_config
        _custom_ops._supports_onednn &= bool(options["cpu_prepack_weights"])
        return super().load_model(vllm_config, *args, **kwargs)

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every bucket describes itself."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    bucket: Bucket | None = None
    tensors: NamedTensors = ()  # of this process
    complete: bool = False  # nothing more will come


class SharedMemoryWeightTransferEngine(
    WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]
):
    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    _places: WeightRouter | None = None  # None: weights are not copied into their places

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        pass

    @functools.cached_property
    def _reader(self) -> BucketReader:
        return BucketReader()

    def start_weight_update(self) -> None:
        self._missing = {name for name, _ in self.model.named_parameters()}
        if self.vllm_config.quant_config is not None or _packed(self.model):
            self._places = None
            initialize_layerwise_reload(self.model)
        elif self._places is None or not self._places.still_hold():
            self._places = WeightRouter(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: that ends in torch.accelerator.synchronize(), absent on a CPU.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the bucket may be filled anew when this returns

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        tensors = update_info.tensors
        if update_info.bucket is not None:
            tensors = self._reader.read(update_info.bucket)
        model: Any = self.model
        self._missing -= (self._places or model).load_weights(tensors)
        if update_info.complete and self._missing:
            # Said here and not at the end: vLLM takes back an update that fails before it.
            self.finish_weight_update()
            raise RolloutError(
                f"The weight update left out {len(self._missing)} tensors of the engine, the first "
                f"is {min(self._missing)}. Export every tensor of the checkpoint."
            )

    def finish_weight_update(self) -> None:
        if self._places is None:
            finalize_layerwise_reload(self.model, self.model_config)
        self._reader.end_update()

    def shutdown(self) -> None:
        pass


def _packed(model: torch.nn.Module) -> bool:
    """Whether a CPU kernel holds its matrix in a form of its own: it closes over it."""
    kernels = (vars(module).get("cpu_linear") for module in model.modules())
    return any(getattr(kernel, "__closure__", None) for kernel in kernels)
