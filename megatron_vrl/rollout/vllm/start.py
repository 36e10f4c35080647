"""From a run's config to an engine: the same for the trainer's own and for a worker's."""

from pathlib import Path

from megatron_vrl.config import RunConfig
from megatron_vrl.rollout.identity import Identity, identity_of
from megatron_vrl.rollout.vllm.engine import VllmEngine


def start_engine(cfg: RunConfig, hf_dir: Path, tensor: int = 1) -> VllmEngine:
    return VllmEngine(
        str(hf_dir),
        cfg.rollout,
        dtype=cfg.model.dtype,
        seed=cfg.run.seed,
        max_model_len=max_model_len(cfg),
        tensor=tensor,
    )


def identity(cfg: RunConfig, hf_dir: Path, banned: tuple[int, ...]) -> Identity:
    """What a worker for this config serves."""
    return identity_of(hf_dir, cfg.model.dtype, max_model_len(cfg), banned)


def max_model_len(cfg: RunConfig) -> int:
    """Tokens of the longest prompt with the longest answer."""
    answer = max(cfg.rollout.max_response_tokens, cfg.evaluation.max_response_tokens)
    return cfg.data.max_prompt_tokens + answer
