"""Reward functions as a user might write them, some of them badly."""

import os
import time

from megatron_vrl.types import Sample


def brief(response: str, sample: Sample) -> float:
    return 1.0 / (1 + len(response))


def named(response: str, sample: Sample) -> float:
    return float(sample.query in response)


def broken(response: str, sample: Sample) -> float:
    return 1 / 0 if "bad" in response else 1.0


def slow(response: str, sample: Sample) -> float:
    if "slow" in response:
        time.sleep(60)
    return 0.5


def leaves(response: str, sample: Sample) -> float:
    if "leave" in response:
        os._exit(3)
    return 0.5


def too_much(response: str, sample: Sample) -> float:
    return 3.0


def nothing(response: str, sample: Sample) -> None:
    return None
