"""Emulated FP8: what is rounded, with which scale, and how far training drifts from bfloat16."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.fp8_emulation import E4M3, E5M2, Quantizer, _Product
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from tests.tiny import GROUPS, present, token_loss
from tests.tiny_models import hf_model, save

RECIPES = ("delayed", "current", "blockwise")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_current_scaling_maps_the_maximum_to_the_format_maximum() -> None:
    values = drawn(8, 32)
    rounded = Quantizer("current")(values, "input")
    scale = 448 / values.abs().max()
    assert torch.equal(rounded, (values * scale).to(E4M3).float() / scale)
    steps = drawn(8, 32)
    scale = 57344 / steps.abs().max()
    assert torch.equal(
        Quantizer("current")(steps, "gradient"), (steps * scale).to(E5M2).float() / scale
    )


def test_delayed_scaling_uses_the_previous_maximum() -> None:
    quantizer = Quantizer("delayed")
    values = drawn(4, 16)
    assert torch.equal(quantizer(values, "input"), values.to(E4M3).float())  # the first scale is 1
    larger = 10 * values
    limit = values.abs().max()
    rounded = quantizer(larger, "input")
    torch.testing.assert_close(rounded.abs().max(), limit)
    small = larger.abs() < limit
    torch.testing.assert_close(rounded[small], larger[small], rtol=0.07, atol=0.03)


def test_block_scales_are_powers_of_two() -> None:
    values = drawn(3, 300)  # two whole blocks and a part of one
    values[0, 5] = 1e4
    rounded = Quantizer("blockwise")(values, "input")
    clean = values.clone()
    clean[0, 5] = 0.0
    other = Quantizer("blockwise")(clean, "input")
    assert torch.equal(rounded[0, 128:], other[0, 128:]) and torch.equal(rounded[1:], other[1:])
    tile = values[1, 128:256]
    scale = 2.0 ** torch.floor(torch.log2(448 / tile.abs().max()))
    assert torch.equal(rounded[1, 128:256], (tile * scale).to(E4M3).float() / scale)
    weight = drawn(256, 130)
    whole = Quantizer("blockwise")(weight, "weight")
    block = weight[128:, :128]
    scale = 2.0 ** torch.floor(torch.log2(448 / block.abs().max()))
    assert torch.equal(whole[128:, :128], (block * scale).to(E4M3).float() / scale)


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_three_products_use_rounded_operands(
    recipe: Literal["delayed", "current", "blockwise"],
) -> None:
    inputs, weight = drawn(40, 160).requires_grad_(), drawn(48, 160, seed=1).requires_grad_()
    gradient = drawn(40, 48, seed=2)
    output = _Product.apply(inputs, weight, Quantizer(recipe))
    output.backward(gradient)
    assert inputs.grad is not None and weight.grad is not None
    by = Quantizer(recipe)
    x, w, g = by(inputs, "input"), by(weight, "weight"), by(gradient, "gradient")
    assert torch.equal(output, x @ w.t())
    assert torch.equal(inputs.grad, g @ w)
    if recipe == "blockwise":  # blocks along the rows, which are summed over
        x, g = by(inputs.t(), "input").t(), by(gradient.t(), "gradient").t()
    assert torch.equal(weight.grad, g.t() @ x)
    exact = gradient.t() @ inputs.detach()
    error = ((weight.grad - exact).norm() / exact.norm()).item()
    assert 0.01 < error < 0.12  # E4M3 has 3 bits behind the point, E5M2 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("fp8") / "hf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def curve(
    checkpoint: Path, mesh: Mesh, steps: int, **model: Any
) -> tuple[npt.NDArray[np.float64], torch.Tensor, torch.Tensor, Policy]:
    """Loss of every step, and the log-probs after them."""
    cfg = Model(checkpoint=str(checkpoint), **model)
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-5), num_steps=steps)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=10_000), mesh)
    before = torch.cat(present(policy.logprobs(batches, Distribution())))
    losses = [policy.update(batches, token_loss, Distribution(), n).loss for n in range(steps)]
    after = torch.cat(present(policy.logprobs(batches, Distribution())))
    return np.array(losses), before, after, policy


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixty_steps_stay_close_to_bfloat16(checkpoint: Path, mesh: Mesh) -> None:
    """One batch again and again: log-probs move, and FP8 stays close to them."""
    plain, before, after, _ = curve(checkpoint, mesh, 60)
    for recipe in RECIPES:
        rounded, first, last, _ = curve(checkpoint, mesh, 60, layers="fp8_emulated", fp8=recipe)
        assert np.abs(rounded / plain - 1).max() < 0.02, recipe
        assert (first - before).abs().mean() < 0.12, recipe
        assert (last - after).abs().mean() < 0.15 < (after - before).abs().mean(), recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_skipped_layers_and_other_modules_are_not_rounded(
    checkpoint: Path, mesh: Mesh, recipe: str
) -> None:
    _, exact, _, plain = curve(checkpoint, mesh, 0)
    _, spared, _, _ = curve(
        checkpoint, mesh, 0, layers="fp8_emulated", fp8=recipe, fp8_skip_first_last_layers=(2, 2)
    )
    _, rounded, _, policy = curve(checkpoint, mesh, 0, layers="fp8_emulated", fp8=recipe)
    assert torch.equal(spared, exact)
    assert not torch.equal(rounded, exact)
    exported = dict(hf_tensors(policy.chunks))
    for name, tensor in hf_tensors(plain.chunks):  # what is exported is what was loaded
        assert tensor.dtype == torch.bfloat16 and torch.equal(exported[name], tensor), name
