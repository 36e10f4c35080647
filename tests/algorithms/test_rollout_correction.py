"""Rollout-correction weights."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_vrl.algorithms import ALGORITHMS, local_sequence_sum, rollout_is_weight, token_loss
from megatron_vrl.config import Algorithm
from tests.algorithms.make_tokens import tokens_of

# two answers of 3 and 2 tokens; probability of the trainer over that of the engine
RATIO = np.array([1.5, 2.5, 0.25, 1.25, 1.5])
PRODUCT = np.array([0.9375, 0.9375, 0.9375, 1.875, 1.875])


def weigh(
    level: Literal["none", "token", "sequence"],
    mode: Literal["clip", "mask"],
    limit: float = 2.0,
    ratio: npt.NDArray[np.float64] = RATIO,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    cfg = Algorithm(rollout_is=level, rollout_is_mode=mode, rollout_is_threshold=limit)
    tokens = tokens_of(
        np.full(5, -2.0),
        np.ones(5),
        old=np.full(5, -1.0),
        engine=-1 - np.log(ratio),
        lengths=[3, 2],
    )
    weight, cut = rollout_is_weight(tokens, cfg)
    assert not weight.requires_grad and not cut.requires_grad
    return weight.numpy(), cut.numpy()


@pytest.mark.parametrize(
    ("level", "mode", "limit", "weight", "cut"),
    [
        ("token", "clip", 2.0, [1.5, 2.0, 0.25, 1.25, 1.5], [0, 1, 0, 0, 0]),
        ("token", "mask", 2.0, [1.5, 0.0, 0.0, 1.25, 1.5], [0, 1, 1, 0, 0]),
        ("token", "mask", 5.0, [1.5, 2.5, 0.25, 1.25, 1.5], [0, 0, 0, 0, 0]),
        ("sequence", "clip", 2.0, PRODUCT, [0] * 5),
        ("sequence", "clip", 1.5, [0.9375] * 3 + [1.5] * 2, [0, 0, 0, 1, 1]),
        ("sequence", "mask", 1.5, [0.9375] * 3 + [0.0] * 2, [0, 0, 0, 1, 1]),
        ("sequence", "mask", 1.05, [0.0] * 5, [1] * 5),
    ],
)
def test_weights_equal_a_table(
    level: Literal["token", "sequence"],
    mode: Literal["clip", "mask"],
    limit: float,
    weight: list[float] | npt.NDArray[np.float64],
    cut: list[int],
) -> None:
    if limit == 5.0:  # 1 / 5 < 0.25: both bounds hold
        assert RATIO.min() > 1 / limit
    ours = weigh(level, mode, limit)
    np.testing.assert_allclose(ours[0], weight, rtol=1e-12)
    np.testing.assert_array_equal(ours[1], cut)


@pytest.mark.parametrize("mode", ["clip", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_equal_probabilities_change_nothing(
    name: str, level: Literal["none", "token", "sequence"], mode: Literal["clip", "mask"]
) -> None:
    off: dict[str, Any] = {"name": name, "kl": 0.0, "entropy": 0.0}
    rng = np.random.default_rng(0)
    old, advantage = rng.normal(-2, 0.5, 5), rng.normal(size=5)
    tokens = tokens_of(old + 0.1, advantage, old=old, engine=old, lengths=[3, 2])
    plain, _ = token_loss(tokens, Algorithm(**off))
    weighted, metrics = token_loss(tokens, Algorithm(**off, rollout_is=level, rollout_is_mode=mode))
    assert torch.equal(weighted, plain)
    assert (metrics["rollout/is_weight"] == 1).all() and (
        metrics["rollout/is_cut_fraction"] == 0
    ).all()


def test_only_the_policy_loss_is_weighted() -> None:
    """Loss and gradient: w x policy + KL - entropy; w is constant though on policy."""
    cfg = Algorithm(kl=0.1, entropy=0.01, rollout_is="token")
    logprob = torch.tensor([-1.0, -2.0, -1.5], dtype=torch.float64, requires_grad=True)
    engine, reference = logprob.detach() - 0.3, logprob.detach() + 0.2
    entropy = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    tokens = tokens_of(logprob, advantage, engine=engine, reference=reference, entropy=entropy)
    loss, metrics = token_loss(tokens, cfg)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    w = float(np.exp(0.3))
    k3 = float(np.exp(0.2) - 0.2 - 1)
    torch.testing.assert_close(loss, -advantage * w + 0.1 * k3 - 0.01 * entropy)
    torch.testing.assert_close(gradient, -advantage * w + 0.1 * (1 - float(np.exp(0.2))))
    torch.testing.assert_close(metrics["actor/policy_loss"], -advantage * w)


@pytest.mark.parametrize("mode", ["clip", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_weights_stay_finite(
    level: Literal["token", "sequence"], mode: Literal["clip", "mask"]
) -> None:
    weight, _ = weigh(level, mode, ratio=np.exp([300.0, -300.0, 250.0, 80.0, -700.0]))
    assert np.isfinite(weight).all() and (weight >= 0).all() and (weight <= 2).all()


def test_sequence_sums_add_up_across_ranks() -> None:
    """Two answers cut over two ranks, in any order of tokens, one rank without the second."""
    index = torch.tensor([0, 1, 0, 1, 0])
    values = torch.tensor([1.0, 10.0, 2.0, 20.0, 4.0], requires_grad=True)
    whole = local_sequence_sum(index)(values)
    assert whole.tolist() == [7.0, 30.0, 7.0, 30.0, 7.0] and not whole.requires_grad
    parts = [torch.tensor([0, 2]), torch.tensor([1, 3, 4])]
    seen: list[torch.Tensor] = []

    def remember(sums: torch.Tensor) -> torch.Tensor:
        seen.append(sums)
        return sums

    for part in parts:
        local_sequence_sum(index[part], 2, remember)(values[part])
    total = seen[0] + seen[1]
    for part in parts:
        ours = local_sequence_sum(index[part], 2, lambda sums: total)(values[part])
        torch.testing.assert_close(ours, whole[part])
    assert local_sequence_sum(index[:0])(values[:0]).shape == (0,)
