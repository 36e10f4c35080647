"""tools/compare_protocols.py: its answers, its table, and one sentence for a wrong argument."""

import json
from pathlib import Path

import pytest
from compare_protocols import ANSWERS, _pair, compared, table

from megatron_vrl.errors import ConfigError

RECORDS = {  # the second truth ends after the video, the third has no length
    "v": {
        "duration": 30.96,
        "timestamps": [[0.0, 15.48], [20.0, 34.0], [5.0, 5.0]],
        "sentences": ["a", "b", "c"],
    }
}


def test_truths_beyond_the_video_are_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS))
    rows = [compared("charades_sta", str(path), answer, 0) for answer in ANSWERS]
    whole, _, published = rows
    assert (whole["strict"]["scored"], whole["clipped"]["scored"]) == (3, 2)
    assert whole["strict"]["miou"] == pytest.approx((15.48 / 30.96 + 10.96 / 34.0) / 3)
    assert whole["clipped"]["miou"] == pytest.approx((15.48 / 30.96 + 10.96 / 30.96) / 2)
    assert published["strict"]["miou"] == pytest.approx(2 / 3)
    assert published["clipped"]["miou"] == pytest.approx(1.0)
    assert "| charades_sta | whole video | 3 / 2 | 27.41 / 42.70 | 33.33 / 50.00 |" in table(rows)


def test_random_answers_are_times_of_the_video_and_repeat(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS))
    first, again, other = (compared("charades_sta", str(path), "random", n) for n in (0, 0, 1))
    assert first == again != other


def test_a_benchmark_without_intervals_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'mvbench=x' is not BENCHMARK=FILE with one of charades"
    ):
        _pair("mvbench=x")
