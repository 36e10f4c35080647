"""vLLM weight-transfer backend "shared_memory": tensors under HF names, a bucket at a time.

A bucket is either tensors of this process (a colocated engine) or memory of another process (a
rollout worker with several vLLM processes, or a bucket of the trainer's machine).

vLLM creates one `SharedMemoryWeightTransferEngine` in every worker process and calls
start_weight_update, update_weights (once per bucket) and finish_weight_update. Two paths exist:

    plain weights       each tensor is copied once, to the location that `WeightRouter` recorded
    packed, quantised   vLLM's layer-wise reload collects a layer's tensors, converts them for the
                        kernels and copies the result over the old one

A bucket holds whole layers, so its memory is free once it has been loaded. `weight_sync.py` is the
trainer's side.

Engines start with zeros (load format "zeros"), since the weights arrive by the first sync. vLLM's
own format "dummy" also randomises buffers that no sync sends, among them the pixel mean and
deviation of the vision tower (vLLM 0.32.0).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
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
from megatron_vrl.rollout.buckets import BucketReader, NamedTensors, WeightBucket
from megatron_vrl.rollout.vllm.compat import allow_weight_packing, packs_weights
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops
from megatron_vrl.rollout.vllm.weight_router import WeightRouter

BACKEND = "shared_memory"
LOAD_FORMAT = "zeros"


@functools.cache
def register() -> None:
    """Register the backend and the load format in this process.

    vLLM calls it in every process that it starts, by the entry point `vllm.general_plugins`.
    """
    declare_missing_ops()
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)
    register_model_loader(LOAD_FORMAT)(ZerosLoader)


class ZerosLoader(BaseModelLoader):
    """Model loader that fills every parameter with zeros and reads no file."""

    def load_model(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:
        options: Any = vllm_config.additional_config
        allow_weight_packing(bool(options["cpu_prepack_weights"]))
        return super().load_model(vllm_config, *args, **kwargs)

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Empty: every bucket describes itself."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket, or the end of the buckets."""

    bucket: WeightBucket | None = None  # memory of another process
    tensors: NamedTensors = ()  # of this process
    complete: bool = False  # True: no more buckets follow


class SharedMemoryWeightTransferEngine(
    WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]
):
    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    _router: WeightRouter | None = None  # None: vLLM's layer-wise reload takes the weights

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        pass

    @functools.cached_property
    def _reader(self) -> BucketReader:
        return BucketReader()

    def start_weight_update(self) -> None:
        self._missing = {name for name, _ in self.model.named_parameters()}
        if self.vllm_config.quant_config is not None or packs_weights(self.model):
            self._router = None
            initialize_layerwise_reload(self.model)
        elif self._router is None or not self._router.is_valid():
            self._router = WeightRouter(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class's method ends in torch.accelerator.synchronize(), absent on a CPU.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the sender may refill the bucket afterwards

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load one bucket. Raises RolloutError if buckets are complete and a tensor is missing."""
        tensors = update_info.tensors
        if update_info.bucket is not None:
            tensors = self._reader.read(update_info.bucket)
        model: Any = self.model
        self._missing -= (self._router or model).load_weights(tensors)
        if update_info.complete and self._missing:
            # Raised here and not in finish_weight_update: vLLM rolls back an update that fails
            # before its end.
            self.finish_weight_update()
            raise RolloutError(
                f"The weight sync left out {len(self._missing)} tensors of the engine, the first "
                f"is {min(self._missing)}: export every tensor of the checkpoint."
            )

    def finish_weight_update(self) -> None:
        if self._router is None:
            finalize_layerwise_reload(self.model, self.model_config)
        self._reader.end_update()

    def shutdown(self) -> None:
        pass
