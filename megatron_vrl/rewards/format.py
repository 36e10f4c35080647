"""Format: 1 when the response has exactly the form of the task's target and can be read."""

from megatron_vrl.types import Parsed, VideoSample


def score(sample: VideoSample, parsed: Parsed) -> float:
    return float(parsed.formatted)
