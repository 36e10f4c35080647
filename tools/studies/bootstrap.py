"""Bootstrap intervals over seeds and questions.

Every seed answers the same questions, so seeds and questions are crossed: a resample draws seeds
with replacement, draws questions with replacement, and averages over both (the pigeonhole
bootstrap: Owen 2007, arXiv 0712.1111). Drawing other questions for each seed would treat one
question as several, and the intervals would be too narrow. With few seeds an interval is still too
narrow: S seeds show (S - 1) / S of the variance between seeds.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95

Values = NDArray[np.float64]
Counts = NDArray[np.int16]


def interval(values: Values) -> tuple[float, float]:
    """Return the bounds of the 95 % percentile interval of the mean of `values` [seeds, questions].

    For a paired difference of two arms, pass the difference of their values. Arrays of one shape
    get the same resamples.
    """
    of_seeds, of_questions = resamples(*values.shape)
    means = np.einsum("bq,bq->b", of_seeds @ values, of_questions) / values.size
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=64)
def resamples(seeds: int, questions: int) -> tuple[Counts, Counts]:
    """Return how often each resample draws each seed [B, S] and each question [B, Q]."""
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    of_questions = rng.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)
    return of_seeds.astype(np.int16), of_questions.astype(np.int16)
