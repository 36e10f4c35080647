"""Advantages of every algorithm compared with plain formulas; several components; length
penalty."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vrl.algorithms import ALGORITHMS, advantages, has_signal
from megatron_vrl.config import Algorithm
from megatron_vrl.rewards.overlong import overlong_penalty
from megatron_vrl.types import RewardComponent

rewards = st.lists(st.floats(0, 1), min_size=2, max_size=8)
steps = st.lists(rewards, min_size=1, max_size=5)
PER_GROUP = [name for name in ALGORITHMS if not name.startswith("reinforce")]
GLOBAL = [name for name in ALGORITHMS if name.startswith("reinforce")]


def spread(values: list[float], ddof: int) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def grpo(groups: list[list[float]]) -> list[list[float]]:
    return [[(r - sum(g) / len(g)) / (spread(g, 1) + 1e-6) for r in g] for g in groups]


def dr_grpo(groups: list[list[float]]) -> list[list[float]]:
    return [[r - sum(g) / len(g) for r in g] for g in groups]


def rloo(groups: list[list[float]]) -> list[list[float]]:
    return [[r - sum(g[:i] + g[i + 1 :]) / (len(g) - 1) for i, r in enumerate(g)] for g in groups]


def reinforce_plus_plus(groups: list[list[float]]) -> list[list[float]]:
    everything = [r for g in groups for r in g]
    mean = sum(everything) / len(everything)
    return [[(r - mean) / (spread(everything, 0) + 1e-6) for r in g] for g in groups]


FORMULAS = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": grpo,
    "gspo": grpo,
    "cispo": grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": lambda groups: reinforce_plus_plus(dr_grpo(groups)),
}


def of(name: str, groups: list[list[float]]) -> list[npt.NDArray[np.float64]]:
    return ALGORITHMS[name].advantages([np.array(group) for group in groups])


def close(
    ours: list[npt.NDArray[np.float64]],
    theirs: Sequence[npt.ArrayLike],
    atol: float = 1e-8,
) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, np.array(b), rtol=1e-8, atol=atol)


@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=40)  # for each algorithm
@given(groups=steps)
def test_advantages_equal_their_formula(name: str, groups: list[list[float]]) -> None:
    close(of(name, groups), FORMULAS[name](groups))


def test_values_by_hand() -> None:
    groups = [[0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    close(of("grpo", groups)[:1], [[-math.sqrt(0.5), math.sqrt(0.5)]], atol=1e-5)
    close(of("dr_grpo", groups), [[-0.5, 0.5], [-0.25, -0.25, -0.25, 0.75]])
    close(of("rloo", groups), [[-1, 1], [-1 / 3, -1 / 3, -1 / 3, 1]])
    low, high = -math.sqrt(0.5), math.sqrt(2)  # mean 1/3, variance 2/9 of all six
    close(of("reinforce_plus_plus", groups), [[low, high], [low] * 3 + [high]], atol=1e-5)
    scale = math.sqrt((2 * 0.25 + 3 * 0.0625 + 0.5625) / 6)
    expected = [np.array([-0.5, 0.5]) / scale, np.array([-0.25, -0.25, -0.25, 0.75]) / scale]
    close(of("reinforce_plus_plus_baseline", groups), expected, atol=1e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=40)  # for each algorithm
@given(groups=steps, shift=st.floats(-5, 5))
def test_a_shift_of_all_rewards_changes_nothing(
    name: str, groups: list[list[float]], shift: float
) -> None:
    """Nearly equal rewards may differ by the rounding of the shift itself."""
    groups = [[round(r, 3) for r in group] for group in groups]
    shift = round(shift, 3)
    shifted = [[r + shift for r in group] for group in groups]
    if any(spread(g, 0) < 1e-4 for g in [*groups, [r for group in groups for r in group]]):
        return
    close(of(name, shifted), of(name, groups), atol=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=40)  # for each algorithm
@given(groups=steps, seed=st.integers(0, 2**16))
def test_answers_and_groups_may_come_in_any_order(
    name: str, groups: list[list[float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    order = [rng.permutation(len(group)) for group in groups]
    shuffled = [[g[i] for i in o] for g, o in zip(groups, order, strict=True)]
    expected = [a[o] for a, o in zip(of(name, groups), order, strict=True)]
    close(of(name, shuffled), expected, atol=1e-7)
    places = rng.permutation(len(groups))
    close(of(name, [groups[p] for p in places]), [of(name, groups)[p] for p in places], atol=1e-7)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1 / 3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_equal_rewards_give_exactly_zero(name: str, value: float) -> None:
    alone = of(name, [[value] * 7])
    everywhere = of(name, [[value] * 7, [value] * 3])
    assert all((a == 0.0).all() and not has_signal(a) for a in [*alone, *everywhere])
    uniform, mixed = of(name, [[value] * 7, [0.0, 1.0, 0.5]])
    assert has_signal(mixed)
    assert has_signal(uniform) == (name == "reinforce_plus_plus")  # it has no baseline per group


@pytest.mark.parametrize("name", PER_GROUP)
def test_a_group_does_not_see_the_others(name: str) -> None:
    groups = [[0.0, 0.3, 1.0], [0.5, 0.1], [0.9, 0.2]]
    assert all((a == of(name, [g])[0]).all() for a, g in zip(of(name, groups), groups, strict=True))


@pytest.mark.parametrize("name", GLOBAL)
def test_a_step_is_normalised_as_a_whole(name: str) -> None:
    groups = [[0.0, 0.3, 1.0], [0.5, 0.1], [0.9, 0.2]]
    everything = np.concatenate(of(name, groups))
    assert everything.mean() == pytest.approx(0, abs=1e-12)
    assert everything.std() == pytest.approx(1, abs=1e-4)
    assert of(name, []) == []


@pytest.mark.parametrize("name", [*PER_GROUP, "reinforce_plus_plus_baseline"])
def test_a_group_of_one_is_compared_with_zero(name: str) -> None:
    (alone,) = of(name, [[0.5]])[:1]
    assert alone.shape == (1,) and np.isfinite(alone).all()
    if name in PER_GROUP:
        assert alone == pytest.approx(0.5, rel=1e-5)


# ---- several components


def components(**values: tuple[list[float], float]) -> dict[str, RewardComponent]:
    return {
        name: RewardComponent(np.array(v, float), weight) for name, (v, weight) in values.items()
    }


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("combine", ["sum_then_normalise", "normalise_then_sum"])
def test_one_component_is_the_reward(
    name: Any, combine: Literal["sum_then_normalise", "normalise_then_sum"]
) -> None:
    values = [[0.0, 0.5, 1.0], [0.2, 0.2]]
    ours = advantages(
        [components(only=(v, 1.0)) for v in values], Algorithm(name=name, combine=combine)
    )
    close(ours, of(name, values), atol=0)


def test_normalise_then_sum_keeps_components_apart() -> None:
    """GDPO's example: components (0, 1) against (0, 2) have one advantage when they are summed."""
    one = components(a=([0, 1], 1.0), b=([0, 0], 1.0))
    both = components(a=([0, 1], 1.0), b=([0, 1], 1.0))
    summed = advantages([one, both], Algorithm())
    close(summed[:1], summed[1:], atol=1e-5)
    separate = advantages([one, both], Algorithm(combine="normalise_then_sum"))
    close(separate[1:], [2 * separate[0]])
    close(separate[:1], of("grpo", [[0, 1]]))


def test_weights_and_tasks_with_different_components() -> None:
    groups = [
        components(format=([0, 1, 1], 0.5), iou=([0.1, 0.2, 0.9], 0.5)),
        components(format=([1, 0], 0.25), accuracy=([1, 0], 0.75)),
    ]
    sums = [[0.05, 0.6, 0.95], [1.0, 0.0]]
    name: Any
    for name in ALGORITHMS:
        cfg = Algorithm(name=name, combine="sum_then_normalise")
        close(advantages(groups, cfg), FORMULAS[name](sums))
        rule = FORMULAS[name]
        form = rule([[0, 1, 1], [1, 0]])
        (iou,), (accuracy,) = rule([[0.1, 0.2, 0.9]]), rule([[1, 0]])
        expected = [
            0.5 * np.array(form[0]) + 0.5 * np.array(iou),
            0.25 * np.array(form[1]) + 0.75 * np.array(accuracy),
        ]
        cfg = Algorithm(name=name, combine="normalise_then_sum")
        close(advantages(groups, cfg), expected)


@pytest.mark.parametrize("combine", ["sum_then_normalise", "normalise_then_sum"])
def test_equal_components_give_exactly_zero(
    combine: Literal["sum_then_normalise", "normalise_then_sum"],
) -> None:
    group = components(a=([0.1] * 5, 0.3), b=([1 / 3] * 5, 0.7), kl=([-0.07] * 5, 1.0))
    (ours,) = advantages([group], Algorithm(combine=combine))
    assert (ours == 0.0).all() and not has_signal(ours)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_reward_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"Reward component 'iou' is not finite: \[0.5, "):
        advantages([components(format=([1, 1], 0.5), iou=([0.5, bad], 0.5))], Algorithm())


# ---- length


def test_the_length_penalty_equals_a_table() -> None:
    """DAPO's own numbers: at most 20480 tokens, of which the last 4096 cost."""
    lengths = np.array([1, 16384, 16385, 18432, 20479, 20480, 30000])
    expected = [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1]
    np.testing.assert_allclose(overlong_penalty(lengths, 20480, 4096), expected, rtol=1e-15)
    assert (overlong_penalty(lengths, 20480, 0) == 0.0).all()
    np.testing.assert_allclose(overlong_penalty(np.array([1, 5, 10]), 10, 10), [-0.1, -0.5, -1])
