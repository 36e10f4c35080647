"""Sample schedule: source weights, curricula, and resuming at any position of an epoch."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Data, Source
from megatron_vrl.data.mix import order
from megatron_vrl.data.pool import Pool
from megatron_vrl.data.schedule import Schedule, read_ids, read_mean_rewards, stages_of
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.trainer.sample_stream import stream_of
from megatron_vrl.types import Sample
from tests.data.test_mix import sample

sources = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([0.1, 0.5, 1.0, 1.5, 3.0])), min_size=1, max_size=4
).filter(lambda pairs: sum(n * w for n, w in pairs) >= 1)


def test_with_equal_weights_an_epoch_is_a_plain_permutation() -> None:
    schedule = Schedule([3, 5], [1.0, 1.0], seed=7)
    for epoch in range(3):
        np.testing.assert_array_equal(schedule.epoch(epoch), order(8, epoch, 7))


@given(sources, st.integers(1, 12))
def test_a_source_contributes_by_its_weight(pairs: list[tuple[int, float]], epochs: int) -> None:
    sizes, weights = [n for n, _ in pairs], [w for _, w in pairs]
    schedule = Schedule(sizes, weights, seed=1)
    rows = [schedule.epoch(number).tolist() for number in range(epochs)]
    count = Counter(index for row in rows for index in row)
    first = 0
    for size, weight in pairs:
        of_source = [count[index] for index in range(first, first + size)]
        assert abs(sum(of_source) - epochs * size * weight) < 1
        assert max(of_source) - min(of_source) <= 1  # every sample equally often
        first += size


@given(sources, st.integers(0, 200))
def test_locate_returns_epoch_and_index(pairs: list[tuple[int, float]], position: int) -> None:
    schedule = Schedule([n for n, _ in pairs], [w for _, w in pairs], seed=1)
    row: list[tuple[int, int]] = []
    number = 0
    while len(row) <= position:
        row += [(number, index) for index in range(len(schedule.epoch(number)))]
        number += 1
    assert schedule.locate(position) == row[position]


def pool(*by_source: list[Sample]) -> Pool:
    kept = [np.arange(len(samples)) for samples in by_source]
    return Pool([Source(json_path="a", data_folder="b")] * len(by_source), by_source, kept)


def data(**keys: Any) -> Data:
    train = [{"json_path": "a", "data_folder": "b", "weight": w} for w in (1, 0.5)]
    return Data.model_validate({"train": train, **keys})


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 5))
def test_a_weighted_stream_continues_exactly(takes: list[int], stop: int) -> None:
    by_source = pool([sample(i) for i in range(4)], [sample(10 + i) for i in range(5)])
    whole = stream_of(by_source, data(), seed=3).take(sum(takes))
    first = stream_of(by_source, data(), seed=3)
    taken = [s for count in takes[:stop] for s in first.take(count)]
    second = stream_of(by_source, data(), seed=3)
    second.restore(first.state)
    assert taken + [s for count in takes[stop:] for s in second.take(count)] == whole


def test_a_curriculum_sorts_by_recorded_reward(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    rows = [{"id": f"v/{i}", "reward": {"mean": i / 10}} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_source = pool([sample(i) for i in range(10)], [])  # two without a record
    keys: dict[str, Any] = {"difficulty": str(path), "curriculum_stages": 2}
    for curriculum, halves in (("easy_first", (4, 0)), ("hard_first", (0, 4))):
        stream = stream_of(by_source, data(curriculum=curriculum, **keys), seed=1)
        taken = [int(s.id.partition("/")[2]) for s in stream.take(10)]
        for start, half in zip((0, 4), halves, strict=True):
            assert set(taken[start : start + 4]) == set(range(half, half + 4))
        assert set(taken[8:]) == {8, 9}
    assert stages_of(["a"], {}, "none", 4) is None


def test_a_selection_keeps_its_samples(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text('{"id": "v/1"}\n\n{"id": "v/12"}\n')
    by_source = pool([sample(i) for i in range(4)], [sample(10 + i) for i in range(5)])
    taken = stream_of(by_source, data(selection=str(path)), seed=1).take(6)
    assert {s.id for s in taken} == {"v/1", "v/12"}
    path.write_text('{"id": "w"}\n')
    with pytest.raises(DataError, match="keeps none of the samples"):
        stream_of(by_source, data(selection=str(path)), seed=1)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text('{"id": "a"}\n{"name": "b"}\n')
    with pytest.raises(DataError, match="line 2: no field id"):
        read_ids(str(path))
    with pytest.raises(DataError, match=r"line 1: no field reward\.mean"):
        read_mean_rewards(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="needs recorded rewards"):
        stream_of(pool([sample(0)], []), data(curriculum="easy_first"), seed=1)
    with pytest.raises(DataError, match=r"give 0\.2 samples to an epoch"):
        Schedule([1, 1], [0.1, 0.1], seed=1)


def test_a_weighted_mix_in_yaml_is_loaded(tmp_path: Path) -> None:
    mix = {
        "datasets": [
            {"json_path": "a.json", "data_folder": "v", "sampling_strategy": "random:10%"},
            {"json_path": "b.jsonl", "data_folder": "w", "sampling_strategy": "first:3"},
            {"json_path": "c.json", "data_folder": "x"},
        ]
    }
    (tmp_path / "tvg.yaml").write_text(yaml.safe_dump(mix))
    train = Data.model_validate({"train": str(tmp_path / "tvg.yaml")}).train
    assert [s.format for s in train] == ["temporal_r1"] * 3
    assert [s.sampling_strategy for s in train] == ["random:10%", "first:3", "all"]
    (tmp_path / "tvg.yaml").write_text("a: b")
    with pytest.raises(ValueError, match="has no list `datasets`"):
        Data.model_validate({"train": str(tmp_path / "tvg.yaml")})
