"""FP8 metrics of clipped, underflowed and non-finite values; over several updates, and for the
buffers of Transformer Engine, which need not be installed."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.fp8_emulation import (
    EmulatedFp8ColumnParallelLinear,
    Quantizer,
    merge_statistics,
)
from megatron_vrl.models.fp8_monitor import OPERANDS, delayed_scaling_amax
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from tests.tiny import GROUPS, token_loss
from tests.tiny_models import hf_model, save


def seen(quantizer: Quantizer, *tensors: torch.Tensor) -> list[float]:
    for tensor in tensors:
        quantizer(tensor, "input")
    return quantizer.pop_statistics()["input"].tolist()


def test_an_outlier_is_clipped_and_counted_once() -> None:
    calm = torch.linspace(0.5, 1.0, 64).view(2, 32)
    wild = calm.clone()
    wild[1, 3] = 100.0
    quantizer = Quantizer("delayed")
    assert seen(quantizer, calm, calm) == [128, 0, 0, 0, 1.0]
    assert seen(quantizer, wild) == [64, 1, 0, 0, 100.0]  # under the scale of the call before
    lost = seen(quantizer, 1e-4 * calm)  # and now the scale is too small for what follows
    assert lost[1:3] == [0, 64] and quantizer.pop_statistics() == {}


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_current_and_block_scaling_clip_no_value(
    recipe: Literal["delayed", "current", "blockwise"],
) -> None:
    values = torch.randn(40, 160, generator=torch.Generator().manual_seed(0))
    values[3, 5], values[3, 6] = 1e6, 1e-4
    count, over, under, nonfinite, amax = seen(Quantizer(recipe), values)
    assert (count, over, nonfinite, amax) == (6400, 0, 0, 1e6)
    if recipe == "current":  # all beside the outlier is rounded to 0
        assert under > 6000
    else:  # only what shares its block of 128 values
        assert 0 < under < 130


def test_non_finite_values_are_counted_and_left_out_of_amax() -> None:
    values = torch.tensor([[1.0, float("inf"), float("nan"), -2.0]])
    assert seen(Quantizer("delayed"), values) == [4, 0, 0, 2, 2.0]
    one, other = torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([[1.0, 1, 1, 1, 9]])
    assert merge_statistics(one, other).tolist() == [[2, 3, 4, 5, 9]]


def test_amax_comes_from_the_history_or_the_scale() -> None:
    recipe = SimpleNamespace(delayed=lambda: True)
    forward = SimpleNamespace(
        amax_history=torch.tensor([[0.0, 3.0, 9.0], [2.0, 1.0, 9.0]]),
        scale=torch.tensor([1.0, 1.0, 1.0]),
    )
    backward = SimpleNamespace(
        amax_history=torch.zeros(1, 2), scale=torch.tensor([57344 / 0.25, 1.0])
    )
    meta = {"recipe": recipe, "scaling_fwd": forward, "scaling_bwd": backward}
    found = {name: row.tolist() for name, row in delayed_scaling_amax(meta).items()}
    assert found == {
        "input": [1, 0, 0, 0, 2.0],
        "weight": [1, 0, 0, 0, 3.0],
        "gradient": [1, 0, 0, 0, 0.25],
    }
    forward.amax_history[0, 0] = float("inf")
    assert delayed_scaling_amax(meta)["input"].tolist() == [1, 0, 0, 1, 0.0]
    assert (
        delayed_scaling_amax({"recipe": SimpleNamespace(delayed=lambda: False)})
        == delayed_scaling_amax({})
        == {}
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("fp8-monitor") / "hf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def updates(
    checkpoint: Path, mesh: Mesh, wild: bool = False, **model: Any
) -> list[dict[str, float]]:
    """FP8 metrics of three updates; `wild`: a weight gets an outlier before the last."""
    policy = Policy(
        read_architecture(checkpoint), Model(checkpoint=str(checkpoint), **model), Parallel(), mesh
    )
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-6), num_steps=3)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=10_000), mesh)
    logged = []
    for step in range(3):
        if step == 2 and wild:
            weight = next(
                module.weight
                for module in policy.chunks[0].modules()
                if isinstance(module, EmulatedFp8ColumnParallelLinear)
            )
            with torch.no_grad():
                weight[0, 0] = 2.0**15
        policy.logprobs(batches, Distribution())  # not counted
        metrics = policy.update(batches, token_loss, Distribution(), step).metrics
        logged.append({name: value for name, value in metrics.items() if name.startswith("fp8/")})
    return logged


def test_an_update_reports_its_outlier(checkpoint: Path, mesh: Mesh) -> None:
    calm = updates(checkpoint, mesh, layers="fp8_emulated", fp8="current")
    kinds = ("amax_max", "nonfinite", "overflow", "underflow")
    assert set(calm[0]) == {f"fp8/{operand}/{kind}" for operand in OPERANDS for kind in kinds}
    for logged in calm:
        assert all(
            logged[f"fp8/{o}/overflow"] == logged[f"fp8/{o}/nonfinite"] == 0 for o in OPERANDS
        )
        assert 0 < logged["fp8/weight/amax_max"] < 10
        assert 0 <= logged["fp8/weight/underflow"] < 0.2
    wild = updates(checkpoint, mesh, wild=True, layers="fp8_emulated", fp8="current")
    assert wild[1] == calm[1]
    assert wild[2]["fp8/weight/amax_max"] == 2.0**15
    assert wild[2]["fp8/weight/underflow"] > calm[2]["fp8/weight/underflow"] + 0.005
    # The first gradients are rounded at a scale of 1.
    delayed = updates(checkpoint, mesh, layers="fp8_emulated", fp8="delayed")
    assert delayed[0]["fp8/gradient/underflow"] > delayed[1]["fp8/gradient/underflow"]


def test_without_fp8_there_are_no_metrics(checkpoint: Path, mesh: Mesh) -> None:
    assert updates(checkpoint, mesh, dtype="float32") == [{}, {}, {}]
