"""One process: the update does not depend on how the batch is cut, on the number format's
rounding, or on chance."""

import pytest
import torch

from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.model.architecture import read_architecture
from megatron_vrl.model.head import Distribution
from megatron_vrl.model.weights import load_published, published_tensors
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.training.batches import plan_batches
from megatron_vrl.training.policy import Policy
from tests.tiny import GROUPS, token_loss
from tests.tiny_models import published_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(published_model(), tmp_path_factory.mktemp("policy") / "hf")


@pytest.fixture(scope="module")
def mesh():
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def updated(checkpoint, mesh, *, tokens=10_000, steps=1, **model):
    """The policy after `steps` updates, and what the last one did."""
    cfg = Model(checkpoint=str(checkpoint), **{"dtype": "float32", **model})
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_published(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-3), num_steps=steps)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=tokens), mesh)
    for step in range(steps):
        update = policy.update(batches, token_loss, Distribution(), step)
    return policy, update


def weights(policy):
    return {name: tensor.clone() for name, tensor in published_tensors(policy.chunks)}


def test_accumulated_gradients_are_those_of_one_batch(checkpoint, mesh):
    whole, one = updated(checkpoint, mesh)
    cut, many = updated(checkpoint, mesh, tokens=1)
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for (name, ours), theirs in zip(weights(cut).items(), weights(whole).values(), strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name


def test_bfloat16_has_float32_gradients_and_main_weights(checkpoint, mesh):
    _, exact = updated(checkpoint, mesh)
    policy, rounded = updated(checkpoint, mesh, dtype="bfloat16")
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)
    params = list(policy.chunks[0].parameters())
    assert {param.dtype for param in params} == {torch.bfloat16}
    assert {param.main_grad.dtype for param in params} == {torch.float32}
    main = [p for group in policy.optimizer.param_groups for p in group["params"]]
    assert {param.dtype for param in main} == {torch.float32}
    # A step smaller than bfloat16's spacing is not lost: it stays in the main weights.
    assert any((p - p.bfloat16()).abs().max() > 0 for p in main)


def test_deterministic_mode_repeats_every_bit(checkpoint, mesh):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (updated(checkpoint, mesh, tokens=60, steps=2)[0] for _ in range(2))
        assert first.chunks[0].config.deterministic_mode
    finally:
        torch.use_deterministic_algorithms(False)
    other = weights(second)
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights(first).items())


def test_log_probs_alone_are_those_of_the_update(checkpoint, mesh):
    policy, _ = updated(checkpoint, mesh)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=60), mesh)
    alone = policy.logprobs(batches, Distribution())
    update = policy.update(batches, token_loss, Distribution(), 1)
    total = sum(float(logprob.sum()) for logprob in alone)
    assert total / sum(map(len, alone)) == pytest.approx(update.metrics["logprob"], rel=1e-5)
