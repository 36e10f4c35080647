"""Loss tokens for tests of algorithms."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from megatron_vrl.algorithms import Tokens, local_sequence_sum


def tokens_of(
    logprob: ArrayLike | Tensor,
    advantage: ArrayLike | Tensor,
    *,
    old: ArrayLike | Tensor | None = None,
    engine: ArrayLike | Tensor | None = None,
    reference: ArrayLike | Tensor | None = None,
    entropy: ArrayLike | Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tokens:
    """float64 unless tensors are given; what is left out is as on policy, entropy 0, one answer."""
    logprob = _tensor(logprob)
    lengths = [len(logprob)] if lengths is None else lengths
    index = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    assert len(index) == len(logprob)
    return Tokens(
        logprob=logprob,
        old_logprob=logprob.detach() if old is None else _tensor(old),
        engine_logprob=logprob.detach() if engine is None else _tensor(engine),
        advantage=_tensor(advantage),
        entropy=torch.zeros_like(logprob.detach()) if entropy is None else _tensor(entropy),
        reference=None if reference is None else _tensor(reference),
        sequence_sum=local_sequence_sum(index),
    )


def _tensor(values: ArrayLike | Tensor) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(np.asarray(values, np.float64))
