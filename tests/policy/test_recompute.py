"""Levels of recompute: each saves less memory and computes more, and none changes a bit."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.pipeline_split import check_divides
from megatron_vrl.observe.op_counter import OpCounter
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from tests.planner.measured import Live, saved_for_backward
from tests.tiny import GROUPS, token_loss
from tests.tiny_models import hf_model, save

LEVELS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "selective"},
    {"recompute": "full", "recompute_num_layers": 2},
    {"recompute": "full", "recompute_vision": "full"},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("recompute") / "hf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def updated(
    checkpoint: Path, mesh: Mesh, model: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Weights after an update, bytes saved for the backward pass at most, operations."""
    cfg = Model(checkpoint=str(checkpoint), dtype="float32", **model)
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-3), num_steps=1)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=10_000), mesh)
    known = {p.untyped_storage().data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
    live = Live()
    with OpCounter() as counter, saved_for_backward(live, known):
        policy.update(batches, token_loss, Distribution(), 0)
    weights = {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}
    return weights, live.most, counter.total


def test_levels_lie_between_none_and_full_and_change_no_bit(checkpoint: Path, mesh: Mesh) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results = [updated(checkpoint, mesh, level) for level in LEVELS]
    finally:
        torch.use_deterministic_algorithms(False)
    none = results[0][0]
    for level, (weights, _, _) in zip(LEVELS, results, strict=True):
        assert all(torch.equal(tensor, none[name]) for name, tensor in weights.items()), level
    memory, operations = [r[1] for r in results], [r[2] for r in results]
    assert all(after < before for before, after in pairwise(memory)), memory
    assert all(after > before for before, after in pairwise(operations)), operations


def test_a_number_of_layers_needs_full_recompute(checkpoint: Path) -> None:
    cfg = Model(checkpoint="", recompute="selective", recompute_num_layers=2)
    with pytest.raises(ConfigError, match=r"recompute_num_layers=2 .* model.recompute=selective"):
        check_divides(read_architecture(checkpoint), cfg, Parallel())
