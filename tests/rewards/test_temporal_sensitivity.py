"""Bonus for the order of the frames: T-GRPO's and TaRO's rules, on values from their code."""

import numpy as np
import pytest

from megatron_vrl.config import RunConfig, check_temporal_reward
from megatron_vrl.errors import ConfigError
from megatron_vrl.rewards.temporal_sensitivity import (
    shuffled_boundaries_bonus,
    shuffled_group_bonus,
)
from megatron_vrl.types import RewardComponent


def components(**scores: list[float]) -> dict[str, RewardComponent]:
    return {name: RewardComponent(np.array(values), 1.0) for name, values in scores.items()}


@pytest.mark.parametrize(
    ("ordered", "shuffled", "bonus"),
    [
        ([1, 0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1, 0]),
        ([1, 0, 0, 0, 1, 0, 0, 1], [1, 0, 0, 1], [0] * 8),  # 0.375 < 0.8 x 0.5
        ([1, 0, 0, 1, 0], [1, 0], [1, 0, 0, 1, 0]),  # 0.4 = 0.8 x 0.5
        ([0, 0], [0], [0, 0]),  # the group passes, and no answer is right
        ([0.1, 0.11, 0.9, 0.2], [0.0, 0.1], [0, 1, 1, 1]),  # right is above 0.1
    ],
)
def test_right_answers_earn_the_bonus_unless_shuffled_frames_do_as_well(
    ordered: list[float], shuffled: list[float], bonus: list[float]
) -> None:
    """T-GRPO: acc_mean >= 0.8 * shuffled_acc_mean, then every accuracy above 0.1."""
    values = shuffled_group_bonus(
        "multiple_choice", components(accuracy=ordered), components(accuracy=shuffled)
    )
    assert values.tolist() == bonus


def test_grounded_questions_need_answer_and_interval() -> None:
    values = shuffled_group_bonus(
        "grounded_qa",
        components(accuracy=[1, 1, 0], temporal_iou=[0.6, 0.05, 0.9], format=[1, 1, 1]),
        components(accuracy=[1], temporal_iou=[0.4]),
    )
    assert values.tolist() == [1, 0, 0]


def test_answers_whose_logprob_falls_most_earn_the_bonus() -> None:
    """TaRO: diff > mean(diff) of the group, and an IoU of at least 0.7."""
    drops = np.array([0.2, 0.5, -0.1, 0.4, 0.25])  # mean 0.25
    ious = np.array([0.9, 0.7, 0.9, 0.69, 1.0])
    assert shuffled_boundaries_bonus(drops, ious).tolist() == [0, 1, 0, 0, 0]
    equal = np.full(4, 0.3)
    assert not shuffled_boundaries_bonus(equal, np.ones(4)).any()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"algorithm": {"ground_truth_answer": "in_group"}}, "algorithm.ground_truth_answer=none"),
        ({"rollout": {"placement": "replay", "replay_dir": "a"}}, "another rollout.placement"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, object], key: str) -> None:
    tree = {"run": {"out_dir": "runs/a"}, "model": {"checkpoint": "c"}}
    cfg = RunConfig.model_validate({**tree, "rewards": {"temporal": "shuffled_group"}, **changes})
    with pytest.raises(ConfigError, match=key):
        check_temporal_reward(cfg)
