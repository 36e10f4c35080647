"""Inference engines by the value of `rollout.backend`. A new engine adds one row to BACKENDS."""

from collections.abc import Callable
from pathlib import Path

from megatron_vrl.config import RunConfig
from megatron_vrl.rollout.interfaces import InferenceEngine
from megatron_vrl.rollout.request import max_model_len
from megatron_vrl.rollout.vllm.engine import VllmEngine


def start_engine(cfg: RunConfig, hf_dir: Path, tensor: int = 1) -> InferenceEngine:
    """Start the engine of `cfg.rollout.backend`. Its weights arrive by the first weight sync.

    hf_dir: config and tokenizer files. tensor: processes that share the model.
    """
    return BACKENDS[cfg.rollout.backend](cfg, hf_dir, tensor)


def _vllm(cfg: RunConfig, hf_dir: Path, tensor: int) -> InferenceEngine:
    return VllmEngine(
        str(hf_dir),
        cfg.rollout,
        dtype=cfg.model.dtype,
        seed=cfg.run.seed,
        max_model_len=max_model_len(cfg),
        tensor=tensor,
    )


BACKENDS: dict[str, Callable[[RunConfig, Path, int], InferenceEngine]] = {"vllm": _vllm}
