"""tools/bench.py at small sizes: its rows say what they should; no speed is tested.

`sync` and `generate` run in tests/jobs/test_stored_job.py, as parts of the GPU check.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, run_python
from tests.video.conftest import write_clip

BENCH = ROOT / "tools" / "bench.py"
pytestmark = pytest.mark.slow


def rows_of(*arguments: object) -> dict[str, dict[str, Any]]:
    done = run_python(BENCH, *arguments, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        row.get("layout", row.get("side", row.get("path"))): row
        for row in map(json.loads, done.stdout.splitlines())
    }


def test_step_counts_the_tokens_of_every_layout() -> None:
    sizes = ("--prompt-tokens", 64, "--answer-tokens", 8, "--group", 4)
    rows = rows_of("step", *sizes, "--layouts", "shared,temporal_r1", "--against", "temporal_r1")
    shared, seed = rows["shared"], rows["temporal_r1"]
    assert list(shared)[:12] == [
        *("bench", "layout", "prompt_tokens", "answer_tokens", "group"),
        *("median_s", "min_s", "max_s", "peak_bytes", "tokens_computed", "ideal_ratio", "ratio"),
    ]
    inputs = 8 - 1  # an answer's last token predicts nothing
    assert shared["tokens_computed"] == 64 + 4 * inputs
    assert seed["tokens_computed"] == 4 * (64 + inputs)
    assert shared["ideal_ratio"] == pytest.approx(5 * 4 * (64 + inputs) / (3 * (64 + 4 * inputs)))
    assert seed["ratio"] == 1 and shared["ratio"] > 0
    assert 0 < shared["min_s"] <= shared["median_s"] <= shared["max_s"]
    assert shared["peak_bytes"] > 0


def test_a_save_needs_the_memory_of_its_own_files() -> None:
    """Three writer processes take some 15 MiB of their own. A gathered save takes five times its
    files here."""
    rows = rows_of("checkpoint", "--ranks", 2, "--hidden", 256, "--layers", 2, "--sides", "ours")
    share_mib = rows["ours"]["mib"] / 2
    assert share_mib > 30
    assert rows["ours"]["peak_ratio"] * share_mib < 1.1 * share_mib + 32
    assert rows["ours"]["most_written"] < 1.05


def test_head_holds_a_part_of_the_logits() -> None:
    sizes = ("--tokens", 4096, "--vocab", 16384, "--hidden", 16)
    rows = rows_of("head", *sizes)
    assert 1.5 * rows["chunked"]["of_logits"] < rows["naive"]["of_logits"]


def test_decode_measures_every_path_beside_a_sequential_read(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(str(clip), num_frames=120, size=(112, 112))
    rows = rows_of("decode", clip, "--frames", 4)
    assert {"pyav-sequential", "ours-pyav", "ours-dali", "store-memory", "store-disk"} <= set(rows)
    assert "workers-1" in rows
    for path, row in rows.items():
        assert list(row)[:6] == [
            *("bench", "path", "file", "frames", "median_s", "ratio_to_pyav_sequential"),
        ]
        base = rows["pyav-sequential"]["median_s"]
        assert row["ratio_to_pyav_sequential"] == pytest.approx(row["median_s"] / base), path
