"""View of a run in a terminal: numbers from known rows, states, width, and the command."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.errors import UserError
from megatron_vrl.observe.top import BLOCKS, COLUMNS, CURVE, curve, view
from megatron_vrl.storage.files import write_error


def grpo(step: int, reward: float, **values: Any) -> dict[str, Any]:
    times = {"rollout": 3.0, "update": 1.0, "other": 0.001}
    return {"phase": "grpo", "step": step, "timing_s": times, "reward/mean": reward, **values}


def run(directory: Path, rows: list[dict[str, Any]], steps: int = 9) -> Path:
    """Return the directory of a run that nothing holds and that has these rows."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    config = {"sft": {"steps": 4}, "grpo": {"steps": steps}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_numbers_of_known_rows(tmp_path: Path) -> None:
    rows = [grpo(step, step / 10, **{"reward/temporal_iou": 0.5}) for step in (1, 2, 3)]
    rows.append(
        {
            "phase": "eval",
            "during": "grpo",
            "split": "dev",
            "step": 2,
            "timing_s": {"evaluate": 1.0},
            "temporal_grounding/miou": 0.375,
            "num_samples": 8.0,
        }
    )
    lines, is_running = view(run(tmp_path, rows))
    assert is_running  # its last row is new, and there is no lock
    assert lines[2] == "GRPO step 3 of 9, 4 s a step, 24 s left"
    assert lines[3] == "time of a step: rollout 75 %, update 25 %"
    table = {line.split()[0]: line.split()[1:] for line in lines[6:8]}
    assert table["reward/mean"] == ["0.3", "0.2", "▁▅█"]
    assert table["reward/temporal_iou"][:2] == ["0.5", "0.5"]
    assert lines[-2:] == [
        "  dev, GRPO step 2",
        "    temporal_grounding/miou                       37.5 %",
    ]


def test_a_finished_run_has_no_time_left(tmp_path: Path) -> None:
    (run(tmp_path, [grpo(1, 0.5)]) / "summary.json").write_text("{}")
    lines, is_running = view(tmp_path)
    assert (lines[0].endswith(": finished"), is_running) == (True, False)
    assert lines[2] == "GRPO step 1 of 9, 4 s a step"


def test_a_long_path_leaves_room_for_the_state(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    (run(folder, [grpo(1, 0.5)]) / "summary.json").write_text("{}")
    (title, *_), _ = view(folder)
    assert title.startswith("...") and title.endswith("long: finished")
    assert len(title) == COLUMNS


def test_a_failed_run_shows_its_error(tmp_path: Path) -> None:
    run(tmp_path, [grpo(1, 0.5)])
    write_error(tmp_path, "The disk is full.")
    lines, is_running = view(tmp_path)
    assert not is_running
    assert lines[1].strip() == "The disk is full."


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200))
def test_a_curve_has_its_extremes(values: list[float]) -> None:
    drawn = curve(values)
    assert len(drawn) == min(CURVE, len(values))
    assert set(drawn) <= set(BLOCKS)
    if len(values) <= CURVE and not math.isclose(min(values), max(values)):
        assert drawn[values.index(max(values))] == BLOCKS[-1]
        assert drawn[values.index(min(values))] == BLOCKS[0]


def test_lines_fit_a_terminal(tmp_path: Path) -> None:
    names = (f"reward/a_component_with_a_very_long_name_{i}" for i in range(3))
    lines, _ = view(run(tmp_path, [grpo(12345, 1e-9, **dict.fromkeys(names, 0.123456))]))
    assert max(map(len, lines)) <= COLUMNS


def test_no_steps_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl with a step yet"):
        view(run(tmp_path, []))


def test_the_command_prints_once_into_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_vrl.cli.top", str(run(tmp_path, [grpo(1, 0.5)]))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.count("GRPO step 1 of 9") == 1
    assert "\x1b" not in printed.stdout
