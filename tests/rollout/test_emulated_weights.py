"""Emulated FP8 weights."""

import pytest
import torch

from megatron_vrl.models.qwen2_5_vl.weight_map import WEIGHTS
from megatron_vrl.rollout.fp8_emulation import emulate_fp8

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rows = torch.tensor([[1e-4], [1.0], [100.0], [0.0]])
    names = ["visual.blocks.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    plain = {name: torch.randn(4, 64) for name in [*names, "model.layers.0.self_attn.q_proj.bias"]}
    return plain | {QUERY: torch.randn(4, 64) * rows}


def test_only_language_matrices_are_rounded(tensors: dict[str, torch.Tensor]) -> None:
    seen = dict(emulate_fp8(tensors.items(), WEIGHTS.language_matrices))
    assert list(seen) == list(tensors)
    assert [name for name in tensors if not torch.equal(seen[name], tensors[name])] == [QUERY]


def test_three_bits_of_mantissa_and_a_scale_for_each_row(tensors: dict[str, torch.Tensor]) -> None:
    before, after = (
        tensors[QUERY],
        dict(emulate_fp8(tensors.items(), WEIGHTS.language_matrices))[QUERY],
    )
    assert torch.all(after[3] == 0)
    largest = before.abs().amax(1, keepdim=True)
    error = (after - before).abs()
    # Half a step of 2^-3, or of the subnormal step 2^-9 at a scale whose largest value is 448.
    assert torch.all(error <= torch.maximum(before.abs() / 16, largest / 448 / 1024) * 1.001)
    assert (error[:3].amax(1) > largest[:3, 0] / 100).all()
    torch.testing.assert_close(after.abs().amax(1), largest[:, 0])  # the scale keeps the largest
    again = dict(emulate_fp8([(QUERY, after)], WEIGHTS.language_matrices))[QUERY]
    torch.testing.assert_close(again, after)
