"""Sources are joined to one list, and the sample order is a function of seed and position."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Source
from megatron_vrl.data.mix import SampleStream, chosen_indices, load, order
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.types import Sample, VideoClip


def sample(index: int) -> Sample:
    return Sample(
        id=f"v/{index}",
        task="temporal_grounding",
        media=(VideoClip("v.mp4"),),
        duration_s=10.0,
        query="q",
        rationale="",
        intervals_s=((1.0, 2.0),),
        options=(),
        option="",
    )


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("end:3", range(7, 10)),
        ("first:99", range(10)),
        ("first:25%", range(3)),  # rounded up
        ("end:70%", range(3, 10)),
        ("first:0.1%", range(1)),
    ],
)
def test_sampling_strategies(strategy: str, kept: range) -> None:
    assert chosen_indices(strategy, 10, [1, 0]) == list(kept)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_random_sampling_is_a_seeded_choice_in_file_order(
    num_samples: int, wanted: int, seed: int
) -> None:
    drawn = chosen_indices(f"random:{wanted}", num_samples, [seed, 0])
    assert len(drawn) == len(set(drawn)) == min(wanted, num_samples)
    assert drawn == sorted(drawn) and set(drawn) <= set(range(num_samples))
    assert drawn == chosen_indices(f"random:{wanted}", num_samples, [seed, 0])


def test_another_seed_or_source_draws_others() -> None:
    dataloader = {
        tuple(chosen_indices("random:10%", 1000, seed)) for seed in ([1, 0], [2, 0], [1, 1])
    }
    assert len(dataloader) == 3


@pytest.mark.parametrize("strategy", ["first", "first:x", "last:3", "first:-1", "random:1.5", ""])
def test_an_unknown_strategy_is_refused(strategy: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen_indices(strategy, 10, [1, 0])
    assert str(error.value) == (
        f"sampling_strategy {strategy!r} is not known; "
        "give all, first:N, end:N or random:N, N a count or a percentage such as 10%."
    )


def test_a_strategy_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="'first:0' keeps none of 10 samples"):
        chosen_indices("first:0", 10, [1, 0])


def test_sources_are_joined_in_order_with_unique_ids(tmp_path: Path) -> None:
    def source(name: str, num_queries: int, strategy: str) -> Source:
        record = {
            "duration": 9.0,
            "timestamps": [[1, 2]] * num_queries,
            "sentences": ["x"] * num_queries,
        }
        (tmp_path / name).write_text(json.dumps({"v": record}))
        return Source(
            json_path=str(tmp_path / name),
            data_folder=f"/{name}",
            format="charades_sta",
            sampling_strategy=strategy,
        )

    one, two = source("one.json", 3, "all"), source("two.json", 3, "end:2")
    samples = load([one, two, one], seed=1)
    assert [s.id for s in samples] == [
        *("v/0", "v/1", "v/2"),
        *("v/1#2", "v/2#2"),
        *("v/0#2", "v/1#3", "v/2#3"),
    ]
    assert [s.first_path for s in samples[2:4]] == ["/one.json/v.mp4", "/two.json/v.mp4"]
    assert samples == load([one, two, one], seed=1)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide() -> None:
    orders = [tuple(order(50, epoch, seed)) for epoch, seed in [(0, 1), (1, 1), (0, 2)]]
    assert all(sorted(indices) == list(range(50)) for indices in orders)
    assert len(set(orders)) == 3
    np.testing.assert_array_equal(order(50, 3, 7), order(50, 3, 7))


@given(
    num_samples=st.integers(1, 20),
    takes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    stop=st.integers(0, 5),
)
def test_a_restored_stream_continues_exactly(num_samples: int, takes: list[int], stop: int) -> None:
    samples = [sample(index) for index in range(num_samples)]
    whole = SampleStream(samples, seed=3).take(sum(takes))
    first = SampleStream(samples, seed=3)
    taken = [s for num in takes[:stop] for s in first.take(num)]
    second = SampleStream(samples, seed=3)
    second.restore(first.state)
    taken += [s for num in takes[stop:] for s in second.take(num)]
    assert taken == whole
    for epoch in range(len(whole) // num_samples):  # every epoch holds every sample once
        of_epoch = whole[epoch * num_samples : (epoch + 1) * num_samples]
        assert {s.id for s in of_epoch} == {s.id for s in samples}


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(DataError, match="There are no samples to train on"):
        SampleStream([], seed=1)
