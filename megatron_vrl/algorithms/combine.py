"""Several reward parts of an answer -> one advantage.

sum_then_normalise: the weighted sum is the reward. normalise_then_sum: every part becomes an
advantage by itself and these are summed by weight, so that parts which add up to the same sum stay
apart (GDPO, arXiv 2601.05242). Left out: GDPO's last step, the normalisation of these sums over the
batch, which only changes their scale.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.algorithms.groups import Advantages, Rewards


class Part(NamedTuple):
    """One reward part of a group's answers."""

    values: NDArray[np.float64]  # [n]
    weight: float


RunContext = Mapping[str, Part]  # of one group; its task decides which there are


def sum_then_normalise(groups: Sequence[RunContext], rule: Advantages) -> list[Rewards]:
    """Advantages [n] of every group's weighted sum of parts."""
    return rule([_sum([part.weight * part.values for part in parts.values()]) for parts in groups])


def normalise_then_sum(groups: Sequence[RunContext], rule: Advantages) -> list[Rewards]:
    """Weighted sums of the parts' advantages; a part's rule sees the groups that have it."""
    terms: list[list[Rewards]] = [[] for _ in groups]
    for name in dict.fromkeys(name for parts in groups for name in parts):
        having = [index for index, parts in enumerate(groups) if name in parts]
        of_part = rule([groups[index][name].values for index in having])
        for index, values in zip(having, of_part, strict=True):
            terms[index].append(groups[index][name].weight * values)
    return [_sum(term) for term in terms]


def check_finite(groups: Sequence[RunContext]) -> None:
    """Raises ValueError for a reward that is no number."""
    for parts in groups:
        for name, part in parts.items():
            if not np.isfinite(part.weight * part.values).all():
                raise ValueError(
                    f"A reward of part {name!r} is not finite: {part.values.tolist()} with "
                    f"weight {part.weight}."
                )


def _sum(terms: Sequence[Rewards]) -> Rewards:
    """In the order given, so that equal rewards have equal sums."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
