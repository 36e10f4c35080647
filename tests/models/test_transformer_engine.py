"""Transformer Engine's layers, attention and FP8 compared with Megatron's, on a GPU."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy, Update
from tests.tiny import GROUPS, present, token_loss
from tests.tiny_models import hf_model, save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("transformer_engine") is None,
        reason="needs a CUDA device and Transformer Engine",
    ),
]
RECIPES = ("delayed", "current", "blockwise")
TE: dict[str, Any] = {"layers": "transformer_engine"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = hf_model(hidden=256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.dim() > 1 else 1.0)
    return save(model, tmp_path_factory.mktemp("te") / "hf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def updated(
    checkpoint: Path,
    mesh: Mesh,
    steps: int = 1,
    layout: Literal["shared", "plain"] = "shared",
    **model: Any,
) -> tuple[torch.Tensor, Update, Policy]:
    """Log-probs under the loaded weights, the last update, the policy after it."""
    cfg = Model(checkpoint=str(checkpoint), **model)
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-5), num_steps=steps)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=10_000, layout=layout), mesh)
    for _ in range(3):  # delayed scaling knows the largest values after a pass
        policy.update(batches, token_loss, Distribution(), 0)
    load_hf_weights(policy.chunks, checkpoint)
    before = torch.cat(present(policy.logprobs(batches, Distribution())))
    update = policy.update(batches, token_loss, Distribution(), 0)
    return before, update, policy


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().mean().item()


@pytest.mark.parametrize("attention", ["sdpa", "flash", "transformer_engine"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_and_attention_equal_megatrons(
    checkpoint: Path, mesh: Mesh, attention: str, recompute: str
) -> None:
    exact, one, _ = updated(checkpoint, mesh, dtype="float32")
    plain, _, _ = updated(checkpoint, mesh)
    engine, other, _ = updated(checkpoint, mesh, attention=attention, recompute=recompute, **TE)
    assert gap(engine, exact) < 1.5 * gap(plain, exact) + 1e-4  # bfloat16's own error
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=0.05)


def test_attention_in_the_plain_layout(checkpoint: Path, mesh: Mesh) -> None:
    exact, _, _ = updated(checkpoint, mesh, dtype="float32", layout="plain")
    for attention in ("sdpa", "flash", "transformer_engine"):
        engine, _, _ = updated(checkpoint, mesh, attention=attention, layout="plain", **TE)
        assert gap(engine, exact) < 0.05


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_equals_emulated_fp8(checkpoint: Path, mesh: Mesh, recipe: str) -> None:
    plain, one, _ = updated(checkpoint, mesh)
    rounded, two, _ = updated(checkpoint, mesh, layers="fp8_emulated", fp8=recipe)
    engine, three, policy = updated(checkpoint, mesh, fp8=recipe, **TE)
    drift = gap(rounded, plain)
    print(
        recipe,
        "fp8-bf16",
        gap(engine, plain),
        "ours-bf16",
        drift,
        "fp8-ours",
        gap(engine, rounded),
        one.grad_norm,
        two.grad_norm,
        three.grad_norm,
    )
    assert gap(engine, plain) < 2 * drift
    assert gap(engine, rounded) < 0.7 * drift  # nearer to ours than either to bfloat16
    assert three.grad_norm == pytest.approx(two.grad_norm, rel=0.1)
    assert {tensor.dtype for _, tensor in hf_tensors(policy.chunks)} == {torch.bfloat16}


@pytest.mark.parametrize("recipe", RECIPES)
def test_skipped_layers_stay_in_bfloat16(checkpoint: Path, mesh: Mesh, recipe: str) -> None:
    plain, _, _ = updated(checkpoint, mesh)
    spared, _, _ = updated(checkpoint, mesh, fp8=recipe, fp8_skip_first_last_layers=(2, 2), **TE)
    some, _, _ = updated(checkpoint, mesh, fp8=recipe, fp8_skip_first_last_layers=(1, 1), **TE)
    every, _, _ = updated(checkpoint, mesh, fp8=recipe, **TE)
    assert gap(spared, plain) < 1e-2
    assert gap(some, plain) < gap(every, plain)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_is_the_policy_until_it_moves(
    checkpoint: Path, mesh: Mesh, recipe: Literal["none", "delayed", "current", "blockwise"]
) -> None:
    cfg = Model(checkpoint=str(checkpoint), fp8=recipe, **TE)
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.keep_reference()
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=10_000), mesh)
    ours = torch.cat(present(policy.logprobs(batches, Distribution())))
    kept = torch.cat(present(policy.reference_logprobs(batches, Distribution())))
    assert gap(ours, kept) < 1e-3
