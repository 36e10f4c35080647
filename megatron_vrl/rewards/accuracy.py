"""Accuracy: 1 when the chosen option is the right one. An unreadable or ambiguous choice is 0."""

from megatron_vrl.types import Parsed, VideoSample


def score(sample: VideoSample, parsed: Parsed) -> float:
    return float(parsed.option == sample.option)
