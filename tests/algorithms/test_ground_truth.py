"""The annotation as an off-policy answer of a group, TempSamp-R1's rules on numbers by hand."""

import math

import numpy as np
import pytest

from megatron_vrl.algorithms import advantages_with_annotation
from megatron_vrl.algorithms.ground_truth import WithTruth, shape_rewards
from megatron_vrl.config import Algorithm, RunConfig, check_ground_truth_answer
from megatron_vrl.errors import ConfigError
from megatron_vrl.types import RewardComponent


def of(
    rule: str, *groups: list[float], name: str = "dr_grpo", weight: float = 1.0
) -> list[WithTruth]:
    keys = {"ground_truth_answer": rule, "ground_truth_weight": weight}
    cfg = Algorithm.model_validate({"name": name, **keys})
    components = [{"reward": RewardComponent(np.array(group), 1.0)} for group in groups]
    return advantages_with_annotation(components, cfg)


def test_in_a_group_of_equal_wrong_answers_only_the_annotation_is_right() -> None:
    [found] = of("in_group", [0.5, 0.5, 0.5, 1.0])
    assert found.sampled == pytest.approx([-0.125] * 3)
    assert found.truth == pytest.approx(0.375)
    [solved] = of("in_group", [1.0, 1.0, 1.0])
    assert solved.truth == 0 and not solved.sampled.any()


def test_the_weight_multiplies_the_annotation_alone() -> None:
    for rule in ("in_group", "anchored", "shaped"):
        [once], [eightfold] = (of(rule, [0.0, 0.5, 1.0], weight=weight) for weight in (1.0, 8.0))
        assert eightfold.truth == pytest.approx(8 * once.truth) and once.truth > 0
        assert eightfold.sampled == pytest.approx(once.sampled)


def test_grpo_divides_by_the_deviation_with_the_annotation() -> None:
    [found] = of("in_group", [0.0, 0.0, 1.0], name="grpo")
    assert found.truth == pytest.approx((2 / 3) / math.sqrt(1 / 3), rel=1e-5)
    assert found.sampled == pytest.approx([(-1 / 3) / math.sqrt(1 / 3)] * 2, rel=1e-5)


def test_an_anchored_annotation_leaves_the_others_alone() -> None:
    first, second = of("anchored", [0.0, 0.5, 1.0], [0.2, 0.2, 1.0])
    assert first.sampled == pytest.approx([-0.25, 0.25]) and first.truth == pytest.approx(0.3)
    assert second.truth == 0 and not second.sampled.any()


def test_shaped_rewards_hardly_rise_above_the_threshold() -> None:
    values = shape_rewards(np.array([1.0, 0.8, 0.5, 0.0]))
    ramp = (math.exp(0.3) - 1) / (math.e - 1), (math.exp(0.8) - 1) / (math.e - 1)
    assert values == pytest.approx([0.8 + 0.01 * math.log(1.2), 0.8, 0.8 - ramp[0], 0.8 - ramp[1]])
    assert np.all(np.diff(shape_rewards(np.linspace(0, 1, 101))) > 0)
    [found] = of("shaped", [0.8, 0.0, 1.0])
    plain = shape_rewards(np.array([0.8, 0.0, 1.0]))
    assert [*found.sampled, found.truth] == pytest.approx(list(plain - plain.mean()))


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ({"combine": "normalise_then_sum"}, "algorithm.combine=sum_then_normalise"),
        ({"kl": 0.1, "kl_in": "reward"}, "algorithm.kl_in=loss"),
    ],
)
def test_what_cannot_be_combined_is_refused(algorithm: dict[str, object], key: str) -> None:
    tree = {"run": {"out_dir": "runs/a"}, "model": {"checkpoint": "c"}}
    cfg = RunConfig.model_validate(
        {**tree, "algorithm": {"ground_truth_answer": "in_group", **algorithm}}
    )
    with pytest.raises(ConfigError, match=key):
        check_ground_truth_answer(cfg)
