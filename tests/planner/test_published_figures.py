"""Planner compared with Megatron-Bridge's published performance summary (H100, FP8).

docs/results/planner.md states the errors; the bounds here keep them from growing.
"""

from dataclasses import replace
from typing import Any

import pytest

from megatron_vrl.config import Batch, Model, Parallel, RolloutConfig, Run, RunConfig
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.planner.hardware import GPUS
from megatron_vrl.planner.memory import optimizer_bytes
from megatron_vrl.planner.parameters import ParameterCounts
from megatron_vrl.planner.plan import PlanRequest, make_plan
from tests.running import ROOT

QWEN = read_architecture(ROOT / "configs" / "models" / "qwen2.5-vl-7b.json")
LLAMA3_8B = replace(
    QWEN, hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8, vocab=128256, tied_head=False
)
LLAMA3_70B = replace(LLAMA3_8B, hidden=8192, mlp=28672, layers=80, heads=64)
LENGTH = 8192


def pretraining(arch: Architecture, gpus: int, batch: int, **parallel: Any) -> tuple[float, float]:
    """A step of text in which every token has a loss: one answer to a prompt of one token."""
    layers: dict[str, Any] = {
        "layers": "transformer_engine",
        "attention": "transformer_engine",
        "fp8": "current",
    }
    cfg = RunConfig(
        run=Run(out_dir=""),
        model=Model(checkpoint="", **layers),
        parallel=Parallel(overlap=True, **parallel),
        rollout=RolloutConfig(group_size=1, prompts_per_step=batch, max_response_tokens=LENGTH),
        batch=Batch(tokens=LENGTH),
    )
    asked = PlanRequest(gpu=GPUS["h100"], gpus=gpus, prompt=1, response=LENGTH)
    plan = make_plan(cfg, arch, asked)
    seconds = plan.phases["update"].seconds + plan.phases["optimizer"].seconds
    return plan.model_flops / plan.tokens, plan.tokens / seconds / gpus


def test_flops_per_token_equal_published_figures() -> None:
    """FLOP/s over tokens/s of the same row."""
    eight, _ = pretraining(LLAMA3_8B, 8, 128)
    seventy, _ = pretraining(LLAMA3_70B, 64, 256, tensor=4, sequence=True, pipeline=8, virtual=5)
    assert eight == pytest.approx(744e12 / 14_451, rel=0.001)
    assert seventy == pytest.approx(731e12 / 1_639, rel=0.01)


def test_tokens_per_second_are_below_published_figures() -> None:
    """Our head computes its logits twice, and messages do not hide behind products."""
    _, eight = pretraining(LLAMA3_8B, 8, 128)
    _, seventy = pretraining(LLAMA3_70B, 64, 256, tensor=4, sequence=True, pipeline=8, virtual=5)
    assert -0.16 < eight / 14_451 - 1 < -0.12
    assert -0.38 < seventy / 1_639 - 1 < -0.30


@pytest.mark.parametrize("sharers", [1, 2, 8])
def test_bytes_per_parameter(sharers: int) -> None:
    """6 + 12 / d with float32 gradients: Megatron-LM's page on its distributed optimizer."""
    cfg = RunConfig(run=Run(out_dir=""), model=Model(checkpoint=""))
    numbers = ParameterCounts(matrices=8000)
    each = 2 + 4 + optimizer_bytes(cfg, numbers, sharers) / numbers.all
    assert each == 6 + 12 / sharers
