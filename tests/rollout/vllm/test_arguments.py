"""Arguments of vLLM's engine by device."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import RolloutConfig
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.qwen2_5_vl.engine import ENGINE
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.rollout.vllm.arguments import engine_arguments


def arguments(
    on_gpu: bool, dtype: str = "bfloat16", max_model_len: int = 256, **rollout: object
) -> dict[str, Any]:
    cfg = RolloutConfig.model_validate(rollout)
    sizes = {"seed": 1, "max_model_len": max_model_len, "tensor": 1}
    return engine_arguments("hf", cfg, ENGINE, PIXELS, dtype=dtype, on_gpu=on_gpu, **sizes)


def test_logits_of_a_bfloat16_engine_on_a_gpu_are_float32() -> None:
    override = {"head_dtype": "float32"}
    assert arguments(True)["hf_overrides"] == override
    assert arguments(True, quantization="fp8")["hf_overrides"] == override
    assert "hf_overrides" not in arguments(True, dtype="float32")
    assert "hf_overrides" not in arguments(False)


@pytest.mark.parametrize(("on_gpu", "seqs", "tokens"), [(True, 256, 8192), (False, 64, 2048)])
def test_batches_are_as_large_as_the_device_can_use(on_gpu: bool, seqs: int, tokens: int) -> None:
    found = arguments(on_gpu)
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (seqs, tokens)
    found = arguments(on_gpu, max_num_seqs=7, max_num_batched_tokens=300)
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (7, 300)
    found = arguments(on_gpu, max_model_len=20_000, max_num_batched_tokens=300)
    assert found["max_num_batched_tokens"] == 20_000


def test_memory_is_given_for_the_device() -> None:
    on_gpu, on_cpu = arguments(True, gpu_memory_utilization=0.3), arguments(False, kv_cache_mib=64)
    assert on_gpu["gpu_memory_utilization"] == 0.3 and on_gpu["enable_sleep_mode"]
    assert on_cpu["kv_cache_memory_bytes"] == 64 << 20 and "enable_sleep_mode" not in on_cpu
    assert arguments(True, quantization="fp8")["quantization"] == "fp8_per_channel"
    with pytest.raises(RolloutError, match=r"rollout\.quantization=fp8 needs a GPU"):
        arguments(False, quantization="fp8")


@pytest.mark.slow
def test_vllm_takes_the_head_in_float32(checkpoint: Path) -> None:
    """A product in bfloat16 whose sums stay float32; by default vLLM rounds each logit."""
    import torch
    from vllm.config import ModelConfig

    model = str(checkpoint)
    assert ModelConfig(model=model, dtype="bfloat16").head_dtype == torch.bfloat16
    overrides = arguments(True)["hf_overrides"]
    given = ModelConfig(model=model, dtype="bfloat16", hf_overrides=overrides)
    assert given.head_dtype == torch.float32
