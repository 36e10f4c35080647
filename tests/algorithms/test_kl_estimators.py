"""KL estimators k1, k2 and k3: values, limits, expectations, and where they are used."""

import math

import numpy as np
import pytest
import torch

from megatron_vrl.algorithms import kl_penalty, token_loss
from megatron_vrl.config import Algorithm
from tests.algorithms.make_tokens import tokens_of

CFG = {name: Algorithm(kl_estimator=name) for name in ("k1", "k2", "k3")}


@pytest.mark.parametrize("d", [-3.0, -0.5, 0.0, 0.25, 2.0])
def test_values(d: float) -> None:
    policy, reference = torch.tensor([d - 1.0]).double(), torch.tensor([-1.0]).double()
    expected = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}
    for name, value in expected.items():
        value = min(value, 10.0) if name == "k3" else value
        assert kl_penalty(policy, reference, CFG[name]).item() == pytest.approx(value, abs=1e-12)


def test_expectation_over_a_vocabulary_is_the_kl() -> None:
    """k1 and k3 without bias, exactly, summed over all tokens by probability; k2 only nearly."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=50))
    policy = logits.log_softmax(-1)
    reference = (logits + torch.tensor(0.1 * rng.normal(size=50))).log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum()
    means = {name: (policy.exp() * kl_penalty(policy, reference, CFG[name])).sum() for name in CFG}
    torch.testing.assert_close(means["k1"], kl)
    torch.testing.assert_close(means["k3"], kl)
    torch.testing.assert_close(means["k2"], kl, rtol=0.1, atol=0.0)


def test_mean_gradients_in_the_loss() -> None:
    """Tokens drawn by probability: k1 pushes nowhere, k2 along the KL, k3 along its reverse."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=20), requires_grad=True)
    reference = torch.tensor(0.5 * rng.normal(size=20)).log_softmax(-1)
    policy = logits.log_softmax(-1)
    (forward,) = torch.autograd.grad(
        (policy.exp() * (policy - reference)).sum(), logits, retain_graph=True
    )
    (reverse,) = torch.autograd.grad(
        (reference.exp() * (reference - policy)).sum(), logits, retain_graph=True
    )
    for name, expected in (("k1", torch.zeros_like(forward)), ("k2", forward), ("k3", reverse)):
        mean = (policy.detach().exp() * kl_penalty(policy, reference, CFG[name])).sum()
        (ours,) = torch.autograd.grad(mean, logits, retain_graph=True)
        torch.testing.assert_close(ours, expected)


def test_k3_is_zero_for_equal_policies_and_bounded_for_far_ones() -> None:
    same = torch.tensor([-1.0, -30.0])
    assert (kl_penalty(same, same, CFG["k3"]) == 0).all()
    far = torch.tensor([0.0, -500.0, 0.0], requires_grad=True)
    value = kl_penalty(far, torch.tensor([-500.0, 0.0, -1.0]), CFG["k3"])
    value.sum().backward()
    assert value[:2].tolist() == [10.0, 10.0]
    assert far.grad is not None and torch.isfinite(far.grad).all()
    assert far.grad[:2].tolist() == [0.0, 0.0] and far.grad[2] > 0


def test_k1_and_k2_are_not_bounded() -> None:
    policy, reference = torch.tensor([0.0]), torch.tensor([-100.0])
    assert kl_penalty(policy, reference, CFG["k1"]).item() == 100.0
    assert kl_penalty(policy, reference, CFG["k2"]).item() == 5000.0


def test_kl_in_the_reward_is_not_in_the_loss() -> None:
    tokens = tokens_of([-1.0, -2.0], [1.0, 1.0], reference=[-1.5, -1.0])
    inside = Algorithm(kl=0.5, entropy=0, kl_estimator="k1")
    outside = Algorithm(kl=0.5, entropy=0, kl_estimator="k1", kl_in="reward")
    without = Algorithm(kl=0, entropy=0)
    plain, metrics = token_loss(tokens, without)
    assert "actor/kl" not in metrics
    assert torch.equal(token_loss(tokens, outside)[0], plain)
    assert "actor/kl" not in token_loss(tokens, outside)[1]
    loss, metrics = token_loss(tokens, inside)
    torch.testing.assert_close(loss - plain, torch.tensor([0.25, -0.5], dtype=torch.float64))
    assert metrics["actor/kl"].tolist() == [0.5, -1.0]
