"""Meters of a step: ratios of its counts, and nothing that is not known."""

from dataclasses import replace

import pytest

from megatron_vrl.observe.metrics import MEANINGS
from megatron_vrl.observe.throughput import FlopCounts, step_meters

COMPUTED = FlopCounts(tokens=1000, linear=5e12, attention=1e12, head=1e12, vision=2e12, merger=1e12)
STEP = {
    "computed": COMPUTED,
    "ideal": replace(COMPUTED, tokens=900),
    "plain_tokens": 4000,
    "padding_rows": 50,
    "update_flops": 3e13,
    "hardware_flops": 4e13,
    "seconds": {"rollout": 6.0, "update": 3.0},
    "ranks": 2,
    "peak": 1e13,
}


def test_values():
    assert step_meters(**STEP) == pytest.approx(
        {
            "tokens_computed": 1000,
            "tokens_ideal": 900,
            "prompt_reuse": 4.0,
            "padding_share": 0.05,
            "tokens_per_second": 100.0,
            "update_tflops_per_second": 5.0,
            "hardware_tflops_per_second": 4e13 / 6 / 1e12,
            "mfu": 0.5,
        }
    )
    assert step_meters(**STEP).keys() <= MEANINGS.keys()


def test_what_is_not_known_is_left_out():
    assert "mfu" not in step_meters(**STEP | {"peak": None})
    assert not {"mfu", "update_tflops_per_second"} & step_meters(**STEP | {"seconds": {}}).keys()
    assert step_meters(**STEP | {"computed": FlopCounts()}) == {}


def test_work_adds_up():
    assert COMPUTED.flops == 10e12
    twice = COMPUTED + COMPUTED
    assert twice.tokens == 2000
    assert twice.flops == 20e12
    assert sum([COMPUTED, COMPUTED], start=FlopCounts()) == twice
