"""How rewards become a loss. A new algorithm is one file (with its paper) and one row here."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl import config
from megatron_vrl.algorithms import grpo

TokenLoss = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, config.Algorithm],
    tuple[Tensor, dict[str, Tensor]],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    advantages: Callable[[NDArray[np.float64], str], NDArray[np.float64]]  # rewards [N], sample id
    teaches: Callable[[NDArray[np.float64]], bool]  # advantages [N] -> has a policy gradient
    token_loss: TokenLoss  # logprobs, old, advantages, reference, entropy, cfg; all [tokens]


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(advantages=grpo.advantages, teaches=grpo.teaches, token_loss=grpo.token_loss),
}
