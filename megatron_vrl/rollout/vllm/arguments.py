"""Arguments of vLLM's engine for a configuration and a device."""

from typing import Any

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.family import EngineInputs
from megatron_vrl.video.rules import PixelRules

PIXEL_CACHE_GIB = 1.0  # processed pixels of recent videos, host memory


def engine_arguments(
    hf_dir: str,
    cfg: config.RolloutConfig,
    inputs: EngineInputs,
    pixels: PixelRules,
    *,
    dtype: str,
    seed: int,
    max_model_len: int,
    tensor: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """Return the arguments of vLLM's LLM class, without the executor."""
    return (_on_gpu(cfg, inputs, dtype) if on_gpu else _on_cpu(cfg)) | {
        "model": hf_dir,
        "load_format": "zeros",
        "dtype": dtype,
        "seed": seed,
        "tensor_parallel_size": tensor,
        "max_model_len": max_model_len,
        "max_num_seqs": cfg.num_seqs(on_gpu),
        "max_num_batched_tokens": max(max_model_len, cfg.batched_tokens(on_gpu)),
        "weight_transfer_config": {"backend": "shared_memory"},
        "additional_config": {"cpu_prepack_weights": cfg.cpu_prepack_weights},
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the checkpoint's sets a repetition penalty
        # Readers refuse more than data.max_videos and data.max_images. A video may come as one
        # block per temporal step, and each block has at least one token.
        "limit_mm_per_prompt": {"video": max_model_len, "image": max_model_len},
        "mm_processor_kwargs": _processor_kwargs(inputs, pixels, max_model_len),
        "mm_processor_cache_gb": PIXEL_CACHE_GIB,
        "enable_mm_embeds": True,  # the trainer may send vision embeddings instead of pixels
        "disable_log_stats": True,
    }


def _processor_kwargs(
    inputs: EngineInputs, pixels: PixelRules, max_model_len: int
) -> dict[str, Any]:
    """Return the arguments of vLLM's processor.

    `max_pixels` resizes nothing, since `do_resize` is off. vLLM reserves memory for an image of
    this size, and a larger one would not fit a prompt.
    """
    largest = {"images_kwargs": {"max_pixels": max_model_len * pixels.cell**2}}
    return {**inputs.processor_kwargs, **largest}


def _on_gpu(cfg: config.RolloutConfig, inputs: EngineInputs, dtype: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": cfg.gpu_memory_utilization,
        "enable_sleep_mode": True,
    }
    if dtype != "float32":
        # Logits in float32 from bfloat16 operands, as the trainer computes them. Otherwise vLLM
        # rounds each logit to bfloat16, in steps of 0.125 between 16 and 32.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if cfg.quantization == "fp8":  # the head is no linear layer for vLLM, and is not quantised
        arguments |= {
            "quantization": "fp8_per_channel",
            "quantization_config": {"ignore": list(inputs.not_quantised)},
        }
    return arguments


def _on_cpu(cfg: config.RolloutConfig) -> dict[str, Any]:
    if cfg.quantization == "fp8":
        raise RolloutError(
            "rollout.quantization=fp8 needs a GPU: set fp8_emulated to emulate FP8 weights."
        )
    return {
        "enforce_eager": True,  # compiling pays off on a GPU only
        "kv_cache_memory_bytes": cfg.kv_cache_mib << 20,
        "block_size": 32,  # short prompts share more of their cache than with 128
        # Chunked prefill rewinds the generator of a seed, which torch cannot do on a CPU.
        "enable_chunked_prefill": False,
    }
