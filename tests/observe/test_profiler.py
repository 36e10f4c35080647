"""StepProfiler: chosen steps and ranks are traced with their phases."""

import gzip
import json
from pathlib import Path

import torch

from megatron_vrl.config import Observe
from megatron_vrl.observe.clock import Clock
from megatron_vrl.observe.profiler import StepProfiler


def test_a_chosen_step_is_traced_with_its_phases(tmp_path: Path) -> None:
    clock, profiler = Clock(), StepProfiler(tmp_path, Observe(profile_steps=[2]), rank=0)
    for step in (1, 2, 3):
        with profiler("grpo", step), clock("update"):
            torch.ones(3, 3).mm(torch.ones(3, 3))
    (file,) = (tmp_path / "traces").iterdir()
    assert file.name == "grpo-000002-rank0000.json.gz"
    with gzip.open(file) as trace:
        events = {event.get("name"): event for event in json.load(trace)["traceEvents"]}
    inner, outer = events["aten::mm"], events["update"]
    assert outer["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_other_ranks_are_not_traced(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, Observe(profile_steps=[1], profile_ranks=[1]), rank=0)
    with profiler("sft", 1):
        torch.ones(3)
    assert not (tmp_path / "traces").exists()
