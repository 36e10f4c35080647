"""Outputs of a frozen tower: one run for each micro-batch of a step, bounded, equal to the bit."""

from collections.abc import Iterator
from contextlib import nullcontext
from math import prod
from pathlib import Path

import pytest
import torch

from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from tests.tiny import GROUPS, present, token_loss
from tests.tiny_models import hf_model, save

PASSES = 4  # old log-probs, reference, two updates


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("outputs") / "hf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


@pytest.fixture
def policy(mesh: Mesh, checkpoint: Path) -> Policy:
    cfg = Model(checkpoint=str(checkpoint), dtype="float32", freeze_vision=True)
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.keep_reference()
    policy.start_phase(Optimizer(lr=1e-2), num_steps=2)
    return policy


def step(policy: Policy, *, keeping: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """Log-probs and weights of a step, runs of the tower, and micro-batches with visuals."""
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=40), policy.mesh)
    before = policy.vision_outputs.runs
    with policy.vision_outputs.kept(PASSES) if keeping else nullcontext():
        old = policy.logprobs(batches, Distribution())
        reference = policy.reference_logprobs(batches, Distribution())
        for number in range(2):
            policy.update(batches, token_loss, Distribution(), number, old=old, reference=reference)
    found = {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}
    found |= {"old": torch.cat(present(old)), "reference": torch.cat(present(reference))}
    return found, policy.vision_outputs.runs - before, sum(bool(b.visuals) for b in batches)


def test_the_tower_runs_once_for_all_passes(policy: Policy, checkpoint: Path) -> None:
    start = {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}
    kept, runs, with_visuals = step(policy, keeping=True)
    assert runs == with_visuals > 1
    assert not policy.vision_outputs._kept  # nothing outlives the step
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-2), num_steps=2)
    again, runs, _ = step(policy, keeping=False)
    assert runs == PASSES * with_visuals
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.items())
    changed = {name for name, tensor in start.items() if not torch.equal(tensor, kept[name])}
    assert any("merger" in name for name in changed)
    assert not any("visual.blocks" in name for name in changed)


def test_outputs_beyond_the_limit_are_computed_again(policy: Policy) -> None:
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=40), policy.mesh)
    patches = [sum(prod(visual.grid_thw) for visual in batch.visuals) for batch in batches]
    assert max(patches) < sum(patches)
    policy.vision_outputs._limit = max(patches) * policy.arch.vision.hidden * 4
    _, runs, with_visuals = step(policy, keeping=True)
    assert with_visuals < runs < PASSES * with_visuals


def test_a_reference_with_another_tower_runs_its_own(policy: Policy) -> None:
    tower = policy._reference[0].vision
    assert tower is not None
    with torch.no_grad():
        tower.patch_embed.weight.mul_(1.5)
    expected = torch.cat(
        present(
            policy.reference_logprobs(
                plan_batches(GROUPS, GROUPS[0], Batch(tokens=40), policy.mesh), Distribution()
            )
        )
    )
    found, runs, with_visuals = step(policy, keeping=True)
    assert runs == 2 * with_visuals
    assert torch.equal(found["reference"], expected)
