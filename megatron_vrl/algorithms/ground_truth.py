"""Advantages of a group that also holds the annotation as an off-policy answer (TempSamp-R1).

The group gets one more answer: the ideal answer that SFT would train on. It earns the reward of its
own text, so a group whose sampled answers are all wrong, and all equally wrong, has a signal.
Source: TempSamp-R1 (arXiv 2509.18056). `algorithm.ground_truth_answer` names the rule:

- `in_group`: the algorithm's own rule over all n + 1 rewards. As the sampled answers improve, the
  annotation's advantage falls, and with it the supervised part of the gradient.
- `anchored` (the paper's advantage anchoring): the sampled answers keep the advantages that they
  have alone, and the annotation gets ANCHOR times the largest of them. A group of equal rewards
  then has no signal.
- `shaped` (the paper's non-linear reward shaping): `in_group` over shaped rewards. Above THRESHOLD
  a reward hardly counts, so that the annotation's perfect reward does not push down all others.

The constants of `shaped` are those of public code that implements the paper. ANCHOR was not checked
against the paper.

The annotation was not sampled, so it has no probability under a sampling policy. Its ratio to the
policy before the step's first update is clipped as for sampled answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vrl.algorithms.groups import Advantages, Rewards

ANCHOR = 1.2
THRESHOLD = 0.8
HIGH_SLOPE = 0.01
LOW_CURVE = 1.0


@dataclass(frozen=True, slots=True)
class WithTruth:
    """Advantages of one group and of its annotation."""

    sampled: Rewards  # [n]
    truth: float


def in_group(groups: Sequence[Rewards], rule: Advantages) -> list[WithTruth]:
    """Return the advantages of `rule` over rewards [n + 1]; the last one is the annotation's."""
    return [WithTruth(values[:-1], float(values[-1])) for values in rule(groups)]


def anchored(groups: Sequence[Rewards], rule: Advantages) -> list[WithTruth]:
    """Return the advantages [n] without the annotation, and ANCHOR times the largest of them."""
    alone = rule([rewards[:-1] for rewards in groups])
    return [WithTruth(values, ANCHOR * float(values.max())) for values in alone]


def shaped(groups: Sequence[Rewards], rule: Advantages) -> list[WithTruth]:
    """Return `in_group` of the shaped rewards."""
    return in_group([shape_rewards(rewards) for rewards in groups], rule)


def shape_rewards(rewards: Rewards) -> Rewards:
    """Return the shaped rewards: t + 0.01 log(r - t + 1) from the threshold t on, below it
    t - (exp(t - r) - 1) / (e - 1).

    Example: 1.0 -> 0.802, 0.8 -> 0.8, 0.5 -> 0.596, 0 -> 0.087.
    """
    above = np.maximum(rewards - THRESHOLD, 0.0)
    below = np.maximum(THRESHOLD - rewards, 0.0)
    penalty = np.expm1(LOW_CURVE * below) / np.expm1(LOW_CURVE)
    values: Rewards = THRESHOLD + HIGH_SLOPE * np.log1p(above) - penalty
    return values


RULES = {"in_group": in_group, "anchored": anchored, "shaped": shaped}
