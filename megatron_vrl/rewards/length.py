"""Length: 1 when a right answer has between the fewest and the most tokens of `length_tokens`.

Video-R1 (arXiv 2503.21776) adds 0.2 to the reward of answers of 320 to 512 tokens whose accuracy
reward is above 0.1. The bonus here is this component's weight, the limits are
`rewards.length_tokens`. A wrong answer gets 0 at any length, so length alone is never rewarded.
"""

from collections.abc import Iterable

LENGTH = "length"
RIGHT = 0.1  # each score of the content must exceed it


def score(correctness: Iterable[float], num_tokens: int, limits: tuple[int, int]) -> float:
    """Return 1 or 0. `correctness`: the answer's components that `Task.correctness` names."""
    shortest, longest = limits
    return float(all(value > RIGHT for value in correctness) and shortest <= num_tokens <= longest)
