"""Partition of temporal steps over ranks: every step once, nearly equal shards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.models.vision_inputs import shard_steps


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_every_step_is_in_one_shard_in_order(sizes: list[int], ranks: int) -> None:
    bounds = shard_steps(sizes, ranks)
    assert len(bounds) == ranks
    assert [i for first, last in bounds for i in range(first, last)] == list(range(len(sizes)))
    shares = [sum(sizes[first:last]) for first, last in bounds]
    if sizes:  # a cut falls inside a step, which goes to one side whole
        assert max(shares) <= sum(sizes) / ranks + max(sizes)


@pytest.mark.parametrize(("steps", "ranks"), [(8, 2), (8, 4), (64, 8)])
def test_equal_steps_make_equal_shards(steps: int, ranks: int) -> None:
    assert {last - first for first, last in shard_steps([12] * steps, ranks)} == {steps // ranks}
