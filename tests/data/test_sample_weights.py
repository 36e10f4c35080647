"""Sampling by difficulty: the weights by their formula, the epochs that they give, and resuming."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Data, load_config
from megatron_vrl.data.mix import order
from megatron_vrl.data.sample_weights import Statistics, read_statistics, sample_weights
from megatron_vrl.data.schedule import Schedule
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.trainer.sample_stream import check_sample_weights, stream_of
from tests.data.test_mix import sample
from tests.data.test_schedule import pool
from tests.running import CONFIG


def data(std_power: float, mean_power: float, **keys: Any) -> Data:
    train = [{"json_path": "a", "data_folder": "b"}]
    powers = {"sample_weight_std_power": std_power, "sample_weight_mean_power": mean_power}
    return Data.model_validate({"train": train} | powers | keys)


def row(index: int, std: float, iou: float) -> dict[str, Any]:
    components = {"format": {"mean": 1.0, "std": 0.0}, "temporal_iou": {"mean": iou, "std": std}}
    return {
        "id": f"v/{index}",
        "task": "temporal_grounding",
        "reward": {"mean": 0.5 + iou / 2, "std": std},
        "components": components,
    }


def test_weights_by_the_formula() -> None:
    recorded = {"a": Statistics(0.2, 0.5), "b": Statistics(0.4, 0.9), "c": Statistics(0.0, 0.0)}
    for a, b in ((0, 2), (1, 0), (2, 1)):
        wanted = [0.2**a * 0.5**b, 0.4**a * 0.1**b, 0.0**a * 1.0**b]
        found = sample_weights(["a", "x", "b", "c"], recorded, data(a, b))
        assert found is not None
        np.testing.assert_allclose(found[[0, 2, 3]], wanted, rtol=1e-6, atol=1e-7)
        assert found[1] == pytest.approx(np.mean(wanted), rel=1e-6)  # "x" was never answered
    assert sample_weights(["y"], recorded, data(0, 2)) is None


def test_statistics_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    undecodable = row(1, 0, 0) | {"components": {}}
    path.write_text("\n".join(map(json.dumps, [row(0, 0.25, 0.5), undecodable])))
    assert read_statistics(str(path)) == {"v/0": Statistics(0.25, 0.5)}
    path.write_text('{"id": "v/0", "reward": {"mean": 0.5}}')
    with pytest.raises(DataError, match=r"line 1: no fields reward\.std and components"):
        read_statistics(str(path))


@given(
    st.lists(st.floats(1e-8, 1.0), min_size=1, max_size=40), st.integers(0, 5), st.integers(0, 9)
)
def test_an_epoch_holds_a_sample_by_its_weight(weights: list[float], epoch: int, seed: int) -> None:
    schedule = Schedule([len(weights)], [1.0], seed, sample_weights=np.array(weights))
    drawn = schedule.epoch(epoch)
    assert len(drawn) == len(weights)
    counts = Counter(drawn.tolist())
    for index, weight in enumerate(weights):
        assert abs(counts[index] - weight * len(weights) / sum(weights)) < 1 + 1e-6
    again = Schedule([len(weights)], [1.0], seed, sample_weights=np.array(weights))
    np.testing.assert_array_equal(drawn, again.epoch(epoch))


def test_over_epochs_the_shares_are_those_of_the_weights() -> None:
    weights = np.array([0.6, 0.3, 0.06, 0.04])
    schedule = Schedule([2, 2], [1.0, 1.0], seed=1, sample_weights=weights)
    counts = np.bincount(np.concatenate([schedule.epoch(n) for n in range(500)]), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), weights, atol=0.02)


def test_a_stream_by_weight_continues_exactly(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    ious = [0.0, 0.0, 0.9, 0.9, 1.0, 1.0]
    path.write_text("\n".join(json.dumps(row(i, 0.1, iou)) for i, iou in enumerate(ious)))
    of_source = pool([sample(i) for i in range(6)])
    hard = data(0, 2, difficulty=str(path))
    whole = [one.id for one in stream_of(of_source, hard, seed=3).take(60)]
    assert Counter(whole)["v/0"] == Counter(whole)["v/1"] >= 29
    resumed = stream_of(of_source, hard, seed=3)
    resumed.restore(17)
    assert [one.id for one in resumed.take(43)] == whole[17:]
    plain = stream_of(of_source, data(0, 0, difficulty=str(path)), seed=3).take(6)
    assert [one.id for one in plain] == [f"v/{i}" for i in order(6, 0, 3)]


def test_weights_without_records_or_with_a_curriculum_are_refused() -> None:
    power = "data.sample_weight_mean_power=2"
    with pytest.raises(ConfigError, match=r"need recorded rewards: give data\.difficulty"):
        check_sample_weights(load_config(CONFIG, [power]))
    check_sample_weights(load_config(CONFIG, [power, "selection.every_epochs=1"]))
    keys = ["data.difficulty=s.jsonl", "data.curriculum=easy_first"]
    with pytest.raises(ConfigError, match=r"data\.curriculum=easy_first orders an epoch"):
        check_sample_weights(load_config(CONFIG, [power, *keys]))
