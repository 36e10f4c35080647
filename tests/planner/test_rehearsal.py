"""Rehearsal of updates on fake GPUs: no host read in a pass, memory and collectives as planned."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vrl.config import load_config
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.planner.workload import row_multiple, step_sizes, worst_batches
from megatron_vrl.rehearsal.ranks import distinct_ranks
from megatron_vrl.rehearsal.recorder import HostReadError, Recorder
from tests.running import ENVIRONMENT, ROOT

WORKER = ROOT / "tests" / "planner" / "rehearsed.py"
DATA = "configs/qwen2.5-vl-3b-8gpu.yaml"
TENSOR_PIPELINE = "configs/qwen2.5-vl-7b-tp2pp2.yaml"
QWEN3 = "configs/models/qwen3-vl-4b.json"  # DeepStack, norms of heads, a tied head
FP8 = "configs/qwen2.5-vl-72b-tp8pp4-fp8.yaml"
# The tower runs in the first of three passes. One of two layers is recomputed.
FROZEN = ["model.freeze_vision=true", "grpo.mini_batches=2", "model.recompute_num_layers=1"]
LORA = ["model.lora.rank=16", "model.freeze_vision=true"]
CASES: list[tuple[str, int, int, list[str]]] = [  # config, layers, rank, overrides
    (DATA, 2, 0, FROZEN),
    (DATA, 2, 0, ["model.recompute=selective"]),
    (DATA, 2, 1, ["parallel.context=2"]),
    (DATA, 2, 0, ["parallel.tensor=2", "algorithm.kl=0"]),
    (TENSOR_PIPELINE, 2, 0, []),
    (TENSOR_PIPELINE, 2, 7, []),
    (TENSOR_PIPELINE, 4, 4, ["parallel.virtual=2", "parallel.overlap=false"]),
    (FP8, 4, 40, []),
    (TENSOR_PIPELINE, 2, 7, [*LORA, "model.freeze_merger=true"]),
    (DATA, 2, 0, [*LORA, "parallel.tensor=2", "model.lora.merger=true", "model.recompute=full"]),
    (DATA, 4, 0, [f"model.architecture={QWEN3}", *FROZEN]),
    (TENSOR_PIPELINE, 6, 0, [f"model.architecture={QWEN3}"]),
    (TENSOR_PIPELINE, 6, 7, [f"model.architecture={QWEN3}"]),
]
# Most dispatched operations of a layer, forward and backward. A backward pass with recompute
# contains a forward pass. Context ranks have a call of attention for each piece of a sequence.
# Norms of heads, DeepStack's additions and adapters take operations of their own.
MOST_OPERATIONS = {
    "vision": (25, 66),
    "language": (28, 64),
    "language, context": (44, 98),
    "language, head norms": (29, 77),
    "language, adapters": (43, 110),
}


def test_a_host_read_in_a_pass_is_an_error() -> None:
    recorder = Recorder({})
    with recorder:
        assert torch.ones(3).sum().item() == 3  # before the passes
        recorder.in_pass = True
        with pytest.raises(HostReadError, match="test_rehearsal"):
            torch.ones(3).sum().item()
        with pytest.raises(HostReadError, match="test_rehearsal"):
            torch.ones(3)[torch.ones(3) > 0]


def kinds(config: str, *overrides: str) -> list[list[int]]:
    cfg = load_config(ROOT / config, list(overrides))
    arch = read_architecture(ROOT / cfg.model.architecture)
    family = family_of(arch)
    batch = next(
        worst_batches(cfg, family, step_sizes(cfg, family), row_multiple(cfg), given=False)
    )
    return list(distinct_ranks(cfg, arch, batch, cfg.parallel.processes).values())


def test_equal_ranks_are_rehearsed_once() -> None:
    assert kinds(DATA) == [list(range(8))]
    assert kinds(DATA, "parallel.context=2") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert kinds(TENSOR_PIPELINE) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(ranks) for ranks in kinds(FP8)] == [16, 16, 16, 16]
    # a video of 8 temporal steps over 16 tensor ranks: every other rank encodes one
    uneven = kinds(FP8, "parallel.tensor=16", "model.fp8=none", "model.layers=megatron")
    assert sorted(map(len, uneven))[:2] == [8, 8]


@pytest.mark.slow
def test_memory_collectives_and_operations_are_as_planned(tmp_path: Path) -> None:
    given, out = tmp_path / "cases.json", tmp_path / "out.json"
    given.write_text(json.dumps(CASES))
    # no warm process: the fake GPU is loaded before torch
    command = [sys.executable, str(WORKER), str(given), str(out)]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for case, row in zip(CASES, json.loads(out.read_text()), strict=True):
        check(row, f"rank {case[2]} of {case[0]} {case[3]}")


def check(row: dict[str, Any], about: str) -> None:
    for name in ("weights", "gradients", "optimizer", "reference"):
        rehearsed, planned = row["memory"][name]
        # A buffer is padded, to shards of equal size.
        assert rehearsed == pytest.approx(planned, rel=1e-5), f"{name}, {about}"
    for name in ("passes", "update"):
        rehearsed, planned = row["memory"][name]
        assert rehearsed == pytest.approx(planned, rel=0.03), f"{name}, {about}"
    for each in row["collectives"]:
        if each["phase"] == "step" and each["operation"] != "all_gather":
            continue  # norm and metrics: a few numbers
        if each["phase"] == "weights":
            continue  # a tied head gets the embedding's values before training
        assert each["calls"][0] == each["calls"][1], f"{each}, {about}"
        assert each["bytes"][0] == pytest.approx(each["bytes"][1], rel=1e-5), f"{each}, {about}"
    for part, layers in row["layers"].items():
        calls = max(1, layers * row["micro_batches"])
        language = part == "language"
        kind = ", context" * (language and "context" in about)
        kind += ", head norms" * (language and QWEN3 in about)
        kind += ", adapters" * (language and "lora" in about)
        mosts = MOST_OPERATIONS[part + kind]
        for phase, most in zip(("forward", "backward"), mosts, strict=True):
            count = row["operations"][phase].get(f"{part} layers", 0)
            assert count <= most * calls, f"{phase} of a {part} layer: {count / calls}, {about}"
