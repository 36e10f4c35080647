"""Overlong penalty: answers close to the length limit lose reward (DAPO, arXiv 2503.14476, eq. 13).

The penalty falls linearly from 0, `buffer` tokens before `limit`, to -1 at `limit`. With limit 100
and buffer 20: 80 tokens -> 0, 90 -> -0.5, 100 -> -1.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

OVERLONG = "overlong"


class Overlong(NamedTuple):
    """Settings of the overlong penalty."""

    limit: int  # tokens of the longest answer: rollout.max_response_tokens
    buffer: int  # tokens before the limit: algorithm.overlong_buffer; 0: no penalty
    weight: float  # reward lost at the limit: algorithm.overlong_penalty


def overlong_penalty(lengths: NDArray[np.int64], limit: int, buffer: int) -> NDArray[np.float64]:
    """Return the penalty in [-1, 0] of answers with these numbers of tokens; 0 if buffer is 0."""
    if buffer == 0:
        return np.zeros(len(lengths))
    return np.clip((limit - buffer - lengths) / buffer, -1.0, 0.0)
