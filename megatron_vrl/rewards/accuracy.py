"""Accuracy: 1 if the chosen option is the right one. An unreadable or ambiguous option scores 0."""

from megatron_vrl.types import Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return 1 for the right option, else 0."""
    return float(parsed.option == sample.option)
