"""Throughput metrics: ratios of a step's counts; unknown values are omitted."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_vrl.observe.metrics import METRICS
from megatron_vrl.observe.throughput import FlopCounts, throughput_metrics

COMPUTED = FlopCounts(tokens=1000, linear=5e12, attention=1e12, head=1e12, vision=2e12, merger=1e12)
STEP: dict[str, Any] = {
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


def test_values() -> None:
    assert throughput_metrics(**STEP) == pytest.approx(
        {
            "perf/tokens_computed": 1000,
            "perf/tokens_needed": 900,
            "perf/prompt_reuse": 4.0,
            "perf/padding_fraction": 0.05,
            "perf/tokens_per_second": 100.0,
            "perf/tflops_per_second": 5.0,
            "perf/hardware_tflops_per_second": 4e13 / 6 / 1e12,
            "perf/mfu": 0.5,
        }
    )
    assert throughput_metrics(**STEP).keys() <= METRICS.keys()


def test_unknown_values_are_omitted() -> None:
    assert "perf/mfu" not in throughput_metrics(**STEP | {"peak": None})
    assert (
        not {"perf/mfu", "perf/tflops_per_second"}
        & throughput_metrics(**STEP | {"seconds": {}}).keys()
    )
    assert throughput_metrics(**STEP | {"computed": FlopCounts()}) == {}


def test_work_adds_up() -> None:
    assert COMPUTED.flops == 10e12
    twice = COMPUTED + COMPUTED
    assert twice.tokens == 2000
    assert twice.flops == 20e12
    assert sum([COMPUTED, COMPUTED], start=FlopCounts()) == twice
