"""Length: 1 when a right answer has a length in tokens that is asked for.

Video-R1 (arXiv 2503.21776) adds 0.2 to the reward of answers of 320 to 512 tokens whose accuracy
reward is above 0.1; the bonus here is this part's weight, the limits are `rewards.length_tokens`.
Wrong answers get nothing, whatever their length, so that length alone is never worth learning.
"""

from collections.abc import Mapping

RIGHT = 0.1  # what makes an answer right enough, of each part that measures it
MEASURES = ("accuracy", "temporal_iou")


def score(parts: Mapping[str, float], num_tokens: int, limits: tuple[int, int]) -> float:
    shortest, longest = limits
    right = all(parts[name] > RIGHT for name in MEASURES if name in parts)
    return float(right and shortest <= num_tokens <= longest)
