"""Reward functions as a user might write them, some of them badly."""

import os
import time


def brief(response, sample):
    return 1.0 / (1 + len(response))


def named(response, sample):
    return float(sample.query in response)


def broken(response, sample):
    return 1 / 0 if "bad" in response else 1.0


def slow(response, sample):
    if "slow" in response:
        time.sleep(60)
    return 0.5


def leaves(response, sample):
    if "leave" in response:
        os._exit(3)
    return 0.5


def too_much(response, sample):
    return 3.0


def nothing(response, sample):
    return None
