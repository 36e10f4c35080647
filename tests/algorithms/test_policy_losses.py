"""Policy losses: properties that all algorithms share; GSPO and CISPO compared with their
formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vrl.algorithms import ALGORITHMS, token_loss
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm
from tests.algorithms.make_tokens import tokens_of

PPO = [name for name in ALGORITHMS if name not in ("gspo", "cispo")]
LENGTHS = [3, 1, 4, 2]


def plain(name: str, **keys: Any) -> Algorithm:
    """Its policy loss alone."""
    return Algorithm.model_validate({"name": name, "kl": 0.0, "entropy": 0.0, **keys})


def random_tokens(distance: float, seed: int = 0) -> tuple[torch.Tensor, Tokens]:
    """Four answers with one advantage each; log-probs about `distance` away from the old ones."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    old = torch.randn(n, generator=generator, dtype=torch.float64) - 2
    logprob = old + distance * torch.randn(n, generator=generator, dtype=torch.float64)
    advantage = torch.tensor([1.0, -2.0, -0.5, 0.7], dtype=torch.float64)
    advantage = advantage.repeat_interleave(torch.tensor(LENGTHS))
    logprob.requires_grad_()
    return logprob, tokens_of(logprob, advantage, old=old, lengths=LENGTHS)


# ---- one contract for every row


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_extreme_ratios_stay_finite(name: str, advantage: float) -> None:
    logprob = torch.tensor([0.0, -300.0, -1.0, -90.0, -30.0], requires_grad=True)
    old = torch.tensor([-300.0, 0.0, -90.0, -1.0, -30.0])
    for lengths in ([1] * 5, [2, 3]):
        tokens = tokens_of(logprob, torch.full((5,), advantage), old=old, lengths=lengths)
        loss, metrics = token_loss(tokens, plain(name))
        (gradient,) = torch.autograd.grad(loss.sum(), logprob)
        assert loss.shape == (5,) and loss.dtype == torch.float32
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
        for value in metrics.values():
            assert value.shape == (5,) and not value.requires_grad and torch.isfinite(value).all()
        if advantage == 0:
            assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_the_gradient_is_that_of_reinforce(name: str) -> None:
    logprob, tokens = random_tokens(distance=0.0)
    loss, metrics = token_loss(tokens, plain(name))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    torch.testing.assert_close(gradient, -tokens.advantage)
    assert (metrics["actor/clip_fraction"] == 0).all() and (metrics["actor/ppo_kl"] == 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_zero_advantages_have_exactly_no_policy_gradient(name: str) -> None:
    logprob, tokens = random_tokens(distance=0.5)
    silent = tokens_of(
        logprob, torch.zeros_like(tokens.advantage), old=tokens.old_logprob, lengths=LENGTHS
    )
    loss, _ = token_loss(silent, plain(name))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("name", PPO)
def test_the_ratio_is_ppos(name: str) -> None:
    logprob, tokens = random_tokens(distance=0.4)
    loss, _ = token_loss(tokens, plain(name, clip=0.1, clip_high=0.3))
    rows = zip(
        logprob.tolist(), tokens.old_logprob.tolist(), tokens.advantage.tolist(), strict=True
    )
    expected = [
        -min(a * math.exp(p - o), a * min(max(math.exp(p - o), 0.9), 1.3)) for p, o, a in rows
    ]
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)


# ---- GSPO


def gspo_by_sequence(logprob: torch.Tensor, tokens: Tokens, cfg: Algorithm) -> torch.Tensor:
    """The paper's objective, answer by answer with autograd, its sign turned: sum over answers."""
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        s = torch.exp((logprob[part] - tokens.old_logprob[part]).sum() / length)
        a = tokens.advantage[start]
        total = total - torch.minimum(s * a, s.clamp(1 - cfg.clip, 1 + cfg.clip_high) * a)
        start += length
    return total


@pytest.mark.parametrize("distance", [0.0, 1e-4, 1e-3, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_gspo_is_the_sequence_level_objective(distance: float, seed: int) -> None:
    """Value and gradient, with the paper's mean over each answer's tokens."""
    cfg = plain("gspo")
    logprob, tokens = random_tokens(distance, seed)
    loss, _ = token_loss(tokens, cfg)
    weight = (1.0 / torch.tensor(LENGTHS).double()).repeat_interleave(torch.tensor(LENGTHS))
    ours = (loss * weight).sum()
    theirs = gspo_by_sequence(logprob, tokens, cfg)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logprob)[0], torch.autograd.grad(theirs, logprob)[0]
    )


def test_gspo_clips_whole_answers() -> None:
    """Tokens far apart whose mean is small are kept, all of them; the others go, all of them."""
    old = torch.zeros(4, dtype=torch.float64)
    logprob = torch.tensor([0.5, -0.5, 1e-3, 1e-3], dtype=torch.float64, requires_grad=True)
    tokens = tokens_of(logprob, torch.ones(4).double(), old=old, lengths=[2, 2])
    loss, metrics = token_loss(tokens, plain("gspo"))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    assert metrics["actor/clip_fraction"].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1.0, 0.0, 0.0]).double())


# ---- CISPO


def test_cispo_keeps_every_gradient() -> None:
    """Ratios 0.01, 1, 3, 20 with either sign: weight min(r, 5) on every token's gradient."""
    ratio = np.array([0.01, 1.0, 3.0, 20.0] * 2)
    advantage = np.array([1.0] * 4 + [-1.0] * 4)
    logprob = torch.tensor(np.log(ratio) - 4, requires_grad=True)
    tokens = tokens_of(logprob, advantage, old=np.full(8, -4.0))
    loss, metrics = token_loss(tokens, plain("cispo"))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    weight = np.minimum(ratio, 5.0)
    np.testing.assert_allclose(gradient.numpy(), -advantage * weight, rtol=1e-12)
    np.testing.assert_allclose(
        loss.detach().numpy(), -advantage * weight * (np.log(ratio) - 4), rtol=1e-12
    )
    assert metrics["actor/clip_fraction"].tolist() == [0, 0, 0, 1] * 2


def test_cispo_takes_a_lower_bound_if_one_is_set() -> None:
    logprob = torch.tensor([-5.0, -4.0], dtype=torch.float64, requires_grad=True)
    tokens = tokens_of(logprob, [1.0, 1.0], old=[-4.0, -4.0])
    loss, metrics = token_loss(tokens, plain("cispo", clip=0.2))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    torch.testing.assert_close(gradient, torch.tensor([-0.8, -1.0]).double())
    assert metrics["actor/clip_fraction"].tolist() == [1, 0]
