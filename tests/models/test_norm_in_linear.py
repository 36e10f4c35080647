"""Norm + linear in one module: equal results, and equal checkpoints, to the bit.

Each test runs for a stand-in of the fused module, and for Transformer Engine's own where it is
installed on a machine without a GPU (tests/models/te_on_cpu.py).
"""

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor

from megatron_vrl.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.checkpoint.torch_dist import TorchDistReader
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models import vision_language_model as models
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.fusion import NORM_IN_LINEAR, parameter_name
from megatron_vrl.models.layers import LayerModules, RMSNorm
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.precision import layer_modules
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy import policy as policies
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.optimizer_state import parameter_states
from megatron_vrl.policy.policy import Policy
from tests import tiny, tiny_qwen3_vl
from tests.models.te_on_cpu import Counts, NormColumnParallelLinear, kernels_of_the_cpu
from tests.tiny import present, token_loss
from tests.tiny_models import MODELS, save

STAND_IN = LayerModules(NormColumnParallelLinear, RowParallelLinear, RMSNorm, norm_in_column=True)
INSTALLED = pytest.mark.skipif(
    torch.cuda.is_available() or find_spec("transformer_engine") is None,
    reason="needs Transformer Engine on a machine without a GPU",
)


@dataclass(frozen=True)
class Fused:
    """The tiny model with fused modules and with Megatron's, under equal weights."""

    checkpoint: Path
    mesh: Mesh
    counts: Counts

    def made(self, layers: str) -> Policy:
        cfg: Any = {"checkpoint": str(self.checkpoint), "dtype": "float32", "layers": layers}
        policy = Policy(read_architecture(self.checkpoint), Model(**cfg), Parallel(), self.mesh)
        load_hf_weights(policy.chunks, self.checkpoint)
        policy.start_phase(Optimizer(lr=1e-3), num_steps=4)
        return policy

    def batches(self) -> list[Any]:
        family = read_architecture(self.checkpoint).family
        groups = (tiny_qwen3_vl if family == "qwen3_vl" else tiny).GROUPS
        return plan_batches(groups, groups[0], Batch(tokens=10_000), self.mesh)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


@pytest.fixture(scope="module", params=["untied", "qwen3-untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(MODELS[request.param](), tmp_path_factory.mktemp("norm") / "hf")


@pytest.fixture(params=["stand-in", pytest.param("Transformer Engine", marks=INSTALLED)])
def fused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, mesh: Mesh
) -> Fused:
    counts: Counts = collections.Counter()
    monkeypatch.setattr(policies, "check_available", lambda *_: None)
    if request.param == "stand-in":

        def chosen(cfg: Model, *args: Any) -> LayerModules:
            return layer_modules(cfg, *args) if cfg.layers == "megatron" else STAND_IN

        monkeypatch.setattr(models, "layer_modules", chosen)
    else:
        kernels_of_the_cpu(monkeypatch, counts)
    return Fused(checkpoint, mesh, counts)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}


def states(policy: Policy) -> dict[tuple[str, str], Tensor]:
    """Optimizer state by the parameter's name with two modules."""
    assert policy.optimizer is not None
    names = {id(p): parameter_name(n) for n, p in policy.chunks[0].named_parameters()}
    return {
        (names[id(state.parameter)], name): tensor.clone()
        for state in parameter_states(policy.optimizer)
        for name, tensor in state.tensors.items()
    }


def assert_equal(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_update_equals_that_of_two_modules_to_the_bit(fused: Fused) -> None:
    two, one = fused.made("megatron"), fused.made("transformer_engine")
    names = {name for name, _ in one.chunks[0].named_parameters()}
    layers = [f"language.decoder.layers.{layer}." for layer in range(one.arch.layers)]
    assert {layer + name + "weight" for layer in layers for name in NORM_IN_LINEAR} <= names
    assert set(map(parameter_name, names)) == {n for n, _ in two.chunks[0].named_parameters()}
    before = [torch.cat(present(p.logprobs(fused.batches(), Distribution()))) for p in (two, one)]
    assert torch.equal(*before)
    norms = {p.update(fused.batches(), token_loss, Distribution(), 0).grad_norm for p in (two, one)}
    assert len(norms) == 1
    assert_equal(weights(one), weights(two))
    assert_equal(states(one), states(two))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("megatron", "transformer_engine"), ("transformer_engine", "megatron")],
)
def test_a_checkpoint_loads_into_the_other_form(
    fused: Fused, writer: str, reader: str, tmp_path: Path
) -> None:
    trained, resumed = fused.made(writer), fused.made(reader)
    trained.update(fused.batches(), token_loss, Distribution(), 0)
    save_checkpoint(tmp_path / "saved", trained, {}, fused.checkpoint)
    stored = TorchDistReader(tmp_path / "saved" / "weights").names()
    assert not any("layer_norm_" in name for name in stored)
    load_checkpoint(tmp_path / "saved", resumed)
    assert_equal(weights(resumed), weights(trained))
    assert_equal(states(resumed), states(trained))


@pytest.mark.parametrize(
    "fused", [pytest.param("Transformer Engine", marks=INSTALLED)], indirect=True
)
def test_kernels_of_a_pass_of_transformer_engine(fused: Fused) -> None:
    """Forward and backward of a layer: four products three times; two norms; and the last norm."""
    policy = fused.made("transformer_engine")
    fused.counts.clear()
    policy.update(fused.batches(), token_loss, Distribution(), 0)
    passes, layers = len(fused.batches()), policy.arch.layers
    assert fused.counts == {
        "generic_gemm": 12 * layers * passes,
        "rmsnorm_fwd": (2 * layers + 1) * passes,
        "rmsnorm_bwd": (2 * layers + 1) * passes,
    }
