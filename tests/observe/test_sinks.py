"""Sinks: rows on disk, resumed runs, full disks, progress bar and wandb."""

import io
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml

from megatron_vrl.config import Observe
from megatron_vrl.errors import UserError
from megatron_vrl.observe.metrics import Phase, StepMetrics
from megatron_vrl.observe.sinks import Sinks, open_sinks
from megatron_vrl.storage.files import RowFile, read_rows

QUIET = Observe(wandb="disabled")


def opened(
    out_dir: Path, resume: tuple[Phase, int] | None = None, cfg: Observe = QUIET, rank: int = 0
) -> Sinks:
    return open_sinks(out_dir, cfg, {"run": {"seed": 3}}, "a run", rank=rank, resume=resume)


def write(
    sinks: Sinks, phase: Literal["sft", "grpo", "eval"], steps: range, tag: float = 0.0
) -> None:
    for step in steps:
        sinks.write(StepMetrics(phase=phase, step=step, values={"reward/mean": tag + step}))


def evaluate(sinks: Sinks, during: str, step: int) -> None:
    values = {"reward/mean": 0.5}
    sinks.write(StepMetrics(phase="eval", step=step, values=values, split="dev", during=during))


def marks(out_dir: Path) -> list[tuple[str, int]]:
    return [(row["phase"], row["step"]) for row in read_rows(out_dir / "metrics.jsonl")]


def test_rows_are_on_disk_before_close(tmp_path: Path) -> None:
    sinks = opened(tmp_path)
    metrics = StepMetrics(
        phase="grpo",
        step=1,
        values={"reward": {"mean": np.float32(0.5), "format": 1}, "actor/kl": float("nan")},
        seconds={"rollout": 1.23456},
    )
    sinks.write(metrics)
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {
            "phase": "grpo",
            "step": 1,
            "timing_s": {"rollout": 1.2346},
            "reward/mean": 0.5,
            "reward/format": 1.0,
            "actor/kl": None,
        }
    ]
    sinks.close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"run": {"seed": 3}}


@pytest.mark.parametrize("stopped_after", [2, 3, 5])
def test_a_resumed_run_has_the_rows_of_one_that_never_stopped(
    tmp_path: Path, stopped_after: int
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    sinks = opened(whole)
    write(sinks, "sft", range(1, 4))
    evaluate(sinks, "sft", 3)
    write(sinks, "grpo", range(1, 6))
    evaluate(sinks, "grpo", 5)
    sinks.close()

    sinks = opened(halved)
    write(sinks, "sft", range(1, 4))
    evaluate(sinks, "sft", 3)
    write(sinks, "grpo", range(1, stopped_after + 1), tag=100.0)
    sinks.close()
    sinks = opened(halved, resume=("grpo", 1))
    write(sinks, "grpo", range(1, 6))
    evaluate(sinks, "grpo", 5)
    sinks.close()
    assert read_rows(halved / "metrics.jsonl") == read_rows(whole / "metrics.jsonl")


def test_resuming_the_warm_up_removes_all_later_rows(tmp_path: Path) -> None:
    sinks = opened(tmp_path)
    write(sinks, "sft", range(1, 5))
    evaluate(sinks, "sft", 4)
    write(sinks, "grpo", range(1, 3))
    sinks.close()
    opened(tmp_path, resume=("sft", 3)).close()
    assert marks(tmp_path) == [("sft", 1), ("sft", 2)]


def test_an_evaluation_is_removed_with_its_phase(tmp_path: Path) -> None:
    sinks = opened(tmp_path)
    evaluate(sinks, "grpo", 0)
    write(sinks, "grpo", range(1, 3))
    evaluate(sinks, "grpo", 2)
    sinks.close()
    opened(tmp_path, resume=("grpo", 2)).close()
    assert marks(tmp_path) == [("eval", 0), ("grpo", 1)]


def test_a_new_run_starts_from_no_rows(tmp_path: Path) -> None:
    for _ in range(2):
        sinks = opened(tmp_path)
        write(sinks, "sft", range(1, 3))
        sinks.close()
    assert marks(tmp_path) == [("sft", 1), ("sft", 2)]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    sinks = opened(tmp_path)
    write(sinks, "grpo", range(1, 4))
    sinks.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert marks(tmp_path) == [("grpo", 1), ("grpo", 2)]
    sinks = opened(tmp_path, resume=("grpo", 3))
    write(sinks, "grpo", range(3, 4))
    sinks.close()
    assert marks(tmp_path) == [("grpo", 1), ("grpo", 2), ("grpo", 3)]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    rows = RowFile(path, None)
    with pytest.raises(UserError, match=r"disk is full.*metrics\.jsonl.*Make room"):
        rows.append({"phase": "sft", "step": 1})
    rows.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    sinks = opened(tmp_path / "out", rank=1)
    sinks.begin("sft", 3)
    write(sinks, "sft", range(1, 4))
    sinks.close()
    assert not (tmp_path / "out").exists()


def test_the_bar_names_phase_step_and_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    sinks = opened(tmp_path)
    sinks.begin("grpo", 8, done=2)
    write(sinks, "grpo", range(3, 5))
    evaluate(sinks, "grpo", 4)
    sinks.close()
    last = terminal.getvalue().split("\r")[-1]
    assert "grpo" in last and "4/8" in last and "reward 4.000" in last


def test_log_once_logs_each_kind_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks = opened(tmp_path)
    for step in (1, 2):
        sinks.log_once("no update", f"Step {step}: nothing was learned.")
    sinks.log_once("other", "Something else.")
    sinks.close()
    assert capsys.readouterr().err == "Step 1: nothing was learned.\nSomething else.\n"


def test_wandb_writes_offline_into_the_run_directory(tmp_path: Path) -> None:
    sinks = opened(tmp_path, cfg=Observe(wandb="offline"))
    write(sinks, "grpo", range(1, 3))
    evaluate(sinks, "grpo", 2)
    sinks.close()
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    logged = record.read_bytes()
    assert b"reward/mean" in logged and b"grpo/step" in logged and b"grpo/reward" not in logged
    assert b"eval/dev/reward/mean" in logged


def test_rows_are_strict_json(tmp_path: Path) -> None:
    sinks = opened(tmp_path)
    sinks.write(StepMetrics(phase="sft", step=1, values={"sft/loss": float("inf")}))
    sinks.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["sft/loss"] is None
