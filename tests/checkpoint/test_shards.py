"""Blocks of a flat range, and the division of equal tensors among ranks."""

from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from megatron_vrl.checkpoint.shards import BLOCK_BYTES, Region, blocks, shard_ranges, sharded
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.weight_map import hf_shapes

MODELS = Path(__file__).parents[2] / "configs" / "models"

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_blocks_hold_the_elements_of_a_range_once_and_in_order(
    shape: list[int], data: DataObject
) -> None:
    low = data.draw(st.integers(0, prod(shape)))
    high = data.draw(st.integers(low, prod(shape)))
    most = data.draw(st.integers(0, prod(shape)))
    tensor = torch.arange(prod(shape)).view(shape)
    found = list(blocks(shape, low, high, most))
    elements: list[int] = []
    for first, offsets, sizes in found:
        block = tensor[tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))]
        assert block.flatten()[0] == first
        assert most == 0 or prod(sizes) <= max(most, prod(shape[1:]))
        elements += block.flatten().tolist()
    assert elements == list(range(low, high))
    assert most or len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize("model", sorted(MODELS.glob("*.json")), ids=lambda path: path.stem)
def test_pinned_memory_of_a_save_is_little_more_than_its_bytes(model: Path) -> None:
    """torch rounds each block's pinned memory up to a power of two."""
    needed = taken = 0
    for shape in hf_shapes(read_architecture(model)).values():
        for element_bytes, tensors in ((2, 1), (4, 3)):  # weight; main weight and two moments
            for _, _, sizes in blocks(shape, 0, prod(shape), BLOCK_BYTES // element_bytes):
                block = prod(sizes) * element_bytes
                needed += tensors * block
                taken += tensors * (1 << (block - 1).bit_length())
    assert needed <= taken < 1.06 * needed


def test_the_example_of_the_docstring() -> None:
    assert list(blocks([6, 4], 5, 18)) == [
        (5, (1, 1), (1, 3)),
        (8, (2, 0), (2, 4)),
        (16, (4, 0), (1, 2)),
    ]


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_ranks_divide_equal_tensors_evenly(sizes: list[int], ranks: int) -> None:
    each = [shard_ranges(sizes, rank, ranks) for rank in range(ranks)]
    for number, size in enumerate(sizes):
        held = [i for ranges in each for i in range(*ranges[number])]
        assert held == list(range(size))
    totals = [sum(high - low for low, high in ranges) for ranges in each]
    assert max(totals, default=0) - min(totals, default=0) <= 1


@pytest.mark.parametrize("start, stop", [(0, 24), (5, 18), (11, 13), (12, 24), (3, 4)])
def test_shards_of_a_parameter_are_views_in_their_place(start: int, stop: int) -> None:
    """A fused weight: rows 0 to 2 are the gate's second half, rows 3 to 5 the up projection's."""
    whole, local = torch.zeros(12, 4), torch.arange(24.0)
    regions = [
        Region(
            key="fc1",
            start=12 * half,
            shape=(3, 4),
            offset=(3 + 6 * half, 0),
            global_shape=(12, 4),
            padded=False,
            replica=(0, 0),
        )
        for half in (0, 1)
    ]
    flat = local[start:stop]
    for shard in sharded(regions, flat, start, "state."):
        assert shard.key == "state.fc1"
        assert 0 <= shard.data.data_ptr() - local.data_ptr() < local.nbytes  # no copy
        assert shard.data.untyped_storage().nbytes() == shard.data.nbytes
        whole[shard.global_slice()] += shard.data
    expected = torch.zeros(24)
    expected[start:stop] = flat
    assert torch.equal(whole[3:6].flatten(), expected[:12])
    assert torch.equal(whole[9:].flatten(), expected[12:])
    assert whole.sum() == flat.sum()
