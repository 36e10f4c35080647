"""GRPO compared with a second implementation from the formulas, and its limits."""

import math
from random import Random
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.algorithms import ALGORITHMS, has_signal, sft, token_loss
from megatron_vrl.config import Algorithm
from tests.algorithms.make_tokens import tokens_of

groups = st.lists(st.floats(0, 1), min_size=2, max_size=16)


def advantages(rewards: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    (group_advantages,) = ALGORITHMS["grpo"].advantages([rewards])
    return group_advantages


@given(groups)
def test_advantages_equal_the_formula(rewards: list[float]) -> None:
    ours = advantages(np.array(rewards))
    if len(set(rewards)) == 1:
        assert (ours == 0.0).all() and not has_signal(ours)
        return
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    theirs = [(r - mean) / (math.sqrt(variance) + 1e-6) for r in rewards]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert has_signal(ours)


@given(groups, st.randoms(use_true_random=False))
def test_advantages_follow_their_rewards(rewards: list[float], random: Random) -> None:
    shuffled = list(range(len(rewards)))
    random.shuffle(shuffled)
    array = np.array(rewards)
    np.testing.assert_allclose(advantages(array[shuffled]), advantages(array)[shuffled], atol=1e-9)
    assert abs(advantages(array).sum()) < 1e-6


def test_equal_rewards_give_exactly_zero() -> None:
    for value in (0.1, 0.3, 0.7, 1 / 3):
        assert (advantages(np.full(7, value)) == 0.0).all()


def test_a_group_of_one_keeps_its_reward() -> None:
    assert advantages(np.array([0.5])) == pytest.approx(0.5 / (1 + 1e-6), rel=1e-12)
    assert has_signal(advantages(np.array([0.5])))


def reference(
    lp: npt.NDArray[np.float64],
    old: npt.NDArray[np.float64],
    adv: npt.NDArray[np.float64],
    ref: npt.NDArray[np.float64],
    entropy: npt.NDArray[np.float64],
    cfg: Algorithm,
) -> list[float]:
    """Token by token in float64, from the formulas."""
    losses = []
    for p, o, a, r, h in zip(lp, old, adv, ref, entropy, strict=True):
        ratio = math.exp(p - o)
        bounded = min(max(ratio, 1 - cfg.clip), 1 + cfg.clip_high)
        kl = min(max(math.exp(r - p) - (r - p) - 1, -10), 10)
        losses.append(-min(a * ratio, a * bounded) + cfg.kl * kl - cfg.entropy * h)
    return losses


@pytest.mark.parametrize("clip_high", [0.2, 0.5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_loss_equals_the_formula(spread: float, clip_high: float) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(-2, spread, 500) for _ in range(2)] + [rng.normal(0, 1, 500)]
    arrays += [rng.normal(-2, spread, 500), rng.uniform(0, 3, 500)]
    cfg = Algorithm(clip=0.2, clip_high=clip_high, kl=0.04, entropy=1e-2)
    lp, old, adv, ref, entropy = arrays
    tokens = tokens_of(lp, adv, old=old, reference=ref, entropy=entropy, engine=old - 0.1)
    loss, metrics = token_loss(tokens, cfg)
    np.testing.assert_allclose(
        loss.numpy(), reference(lp, old, adv, ref, entropy, cfg), rtol=1e-9, atol=1e-12
    )
    ratio = np.exp(lp - old)
    active = ((ratio > 1 + clip_high) & (adv > 0)) | ((ratio < 0.8) & (adv < 0))
    np.testing.assert_array_equal(metrics["actor/clip_fraction"].numpy(), active)
    np.testing.assert_allclose(metrics["actor/ppo_kl"].numpy(), old - lp)
    when_sampled = abs(old - (old - 0.1))
    np.testing.assert_allclose(metrics["rollout/logprob_gap"].numpy(), when_sampled)
    np.testing.assert_array_equal(metrics["actor/entropy"].numpy(), entropy)


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    logprobs = torch.randn(50, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(50, dtype=torch.float64)
    cfg = Algorithm(kl=0.0, entropy=0.0)
    loss, metrics = token_loss(tokens_of(logprobs, advantage), cfg)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantage)
    assert metrics["actor/clip_fraction"].sum() == 0 and metrics["actor/ppo_kl"].abs().sum() == 0
    always = {"actor/policy_loss", "actor/clip_fraction", "actor/ppo_kl", "actor/entropy"}
    assert set(metrics) == always | {"rollout/logprob_gap", "rollout/logprob_gap_max"}


def test_clipped_tokens_have_no_gradient() -> None:
    logprobs = torch.log(torch.tensor([1.3, 0.7, 1.3, 0.7])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    tokens = tokens_of(logprobs, advantage, old=torch.zeros(4))
    loss, _ = token_loss(tokens, Algorithm(kl=0.0, entropy=0.0))
    loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, 1.3, -0.7]))


def test_the_upper_bound_is_independent() -> None:
    """DAPO's: 1.25 is inside 1 + 0.28 and outside 1 + 0.2."""
    for cfg, gradient in ((Algorithm(name="dapo"), -1.25), (Algorithm(kl=0, entropy=0), 0.0)):
        logprobs = torch.log(torch.tensor([1.25])).requires_grad_()
        tokens = tokens_of(logprobs, torch.ones(1), old=torch.zeros(1))
        token_loss(tokens, cfg)[0].sum().backward()
        torch.testing.assert_close(logprobs.grad, torch.tensor([gradient]))


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_the_gradient_equals_finite_differences(kl_estimator: Literal["k1", "k2", "k3"]) -> None:
    generator = torch.Generator().manual_seed(0)
    old, adv, ref, entropy = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    logprobs = (old + 0.5).requires_grad_()
    entropy.requires_grad_()
    cfg = Algorithm(kl=0.1, entropy=0.1, kl_estimator=kl_estimator)

    def loss(lp: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return token_loss(tokens_of(lp, adv, old=old, reference=ref, entropy=h), cfg)[0]

    assert torch.autograd.gradcheck(loss, (logprobs, entropy))


def test_far_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -300.0], requires_grad=True)
    old = torch.tensor([-300.0, 0.0])
    for advantage in (1.0, -1.0):
        cfg = Algorithm(kl=0.0, entropy=0.0)
        loss, _ = token_loss(tokens_of(logprobs, torch.full((2,), advantage), old=old), cfg)
        gradient = torch.autograd.grad(loss.sum(), logprobs)[0]
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_sft_loss_is_cross_entropy() -> None:
    logits, target = torch.randn(6, 11), torch.randint(11, (6,))
    logprobs = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    loss, metrics = sft.token_loss(tokens_of(logprobs, torch.zeros(6)))
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, target, reduction="none")
    )
    assert set(metrics) == {"cross_entropy"}
