"""Combine several reward components of an answer into one advantage.

`sum_then_normalise` adds the weighted components and computes the advantage of the sum.
`normalise_then_sum` computes an advantage of each component and adds these by weight, so that
components with equal sums stay apart (GDPO, arXiv 2601.05242). GDPO's last step, which normalises
the sums over the batch and only changes their scale, is left out.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_vrl.algorithms.groups import Advantages, Rewards
from megatron_vrl.types import RewardComponent, sum_in_order, total_reward

Components = Mapping[str, RewardComponent]  # of one group; its task decides which there are


def sum_then_normalise(groups: Sequence[Components], rule: Advantages) -> list[Rewards]:
    """Return the advantages [n] of every group's total reward."""
    return rule([total_reward(components) for components in groups])


def normalise_then_sum(groups: Sequence[Components], rule: Advantages) -> list[Rewards]:
    """Return the weighted sums [n] of the components' advantages.

    `rule` gets a component of all groups that have it: those of one task, or of several.
    """
    terms: list[list[Rewards]] = [[] for _ in groups]
    for name in dict.fromkeys(name for components in groups for name in components):
        having = [index for index, components in enumerate(groups) if name in components]
        advantages = rule([groups[index][name].values for index in having])
        for index, values in zip(having, advantages, strict=True):
            terms[index].append(groups[index][name].weight * values)
    return [sum_in_order(term) for term in terms]


def check_finite(groups: Sequence[Components]) -> None:
    """Raise ValueError if a weighted reward component is NaN or infinite."""
    for components in groups:
        for name, component in components.items():
            if not np.isfinite(component.weight * component.values).all():
                raise ValueError(
                    f"Reward component {name!r} is not finite: {component.values.tolist()} with "
                    f"weight {component.weight}."
                )
