"""Format: 1 if the response has exactly the format of the task's target and can be read."""

from megatron_vrl.types import Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return 1 for a formatted response, else 0."""
    return float(parsed.formatted)
