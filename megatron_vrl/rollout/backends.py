"""Inference engines by the value of `rollout.backend`. A new engine adds one row to BACKENDS."""

from pathlib import Path
from typing import Protocol

from megatron_vrl.config import RolloutConfig, RunConfig
from megatron_vrl.rollout.interfaces import InferenceEngine
from megatron_vrl.rollout.request import max_model_len
from megatron_vrl.rollout.vllm.engine import VllmEngine


class Backend(Protocol):
    """Starts an engine without weights. `VllmEngine` documents the arguments."""

    def __call__(
        self,
        hf_dir: str,
        cfg: RolloutConfig,
        *,
        dtype: str,
        seed: int,
        max_model_len: int,
        tensor: int = 1,
    ) -> InferenceEngine: ...


BACKENDS: dict[str, Backend] = {"vllm": VllmEngine}


def start_engine(cfg: RunConfig, hf_dir: Path, tensor: int = 1) -> InferenceEngine:
    """Start the engine of a run. Its weights arrive by the first weight sync.

    hf_dir: config and tokenizer files. tensor: processes that share the model.
    """
    return BACKENDS[cfg.rollout.backend](
        str(hf_dir),
        cfg.rollout,
        dtype=cfg.model.dtype,
        seed=cfg.run.seed,
        max_model_len=max_model_len(cfg),
        tensor=tensor,
    )
