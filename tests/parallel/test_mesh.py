"""Device mesh: layout checks, and errors that all ranks raise together."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Parallel
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.parallel.mesh import (
    Axis,
    Mesh,
    check_layout,
    close_mesh,
    init_mesh,
    interleave,
    raise_on_all_ranks,
    shard,
)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 1), (2, 1, 4), (2, 2, 8)])
def test_layouts_that_divide(tensor: int, pipeline: int, world: int) -> None:
    check_layout(Parallel(tensor=tensor, pipeline=pipeline), world)


@pytest.mark.parametrize(
    ("layout", "world", "sentence"),
    [
        (
            {"tensor": 2},
            3,
            "parallel.tensor=2 x parallel.pipeline=1 needs a multiple of 2 processes, not 3: "
            "change --nproc-per-node or the layout.",
        ),
        (
            {"context": 2, "pipeline": 2},
            6,
            "parallel.tensor=1 x parallel.context=2 x parallel.pipeline=2 needs a multiple of 4 "
            "processes, not 6: change --nproc-per-node or the layout.",
        ),
        (
            {"virtual": 2},
            2,
            "parallel.virtual > 1 needs parallel.pipeline > 1: set one of them.",
        ),
        (
            {"sequence": True},
            2,
            "parallel.sequence=true needs parallel.tensor > 1: set one of them.",
        ),
    ],
)
def test_layouts_that_do_not_divide(layout: dict[str, Any], world: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_layout(Parallel(**layout), world)
    assert str(error.value) == sentence


def test_one_process_is_all_axes(mesh: Mesh) -> None:
    axes = (mesh.tensor, mesh.context, mesh.pipeline, mesh.data)
    for axis in (*axes, mesh.vision, mesh.batch, mesh.model):
        assert (axis.rank, axis.size) == (0, 1)
    assert not mesh.interleaved


def test_a_second_mesh_can_be_built(mesh: Mesh) -> None:
    close_mesh()
    again = init_mesh(Parallel(), seed=1)
    assert again.world == 1


def test_a_user_error_is_raised_on_all_ranks(mesh: Mesh) -> None:
    mine = VideoError("a.mp4 is empty.")  # another rank's error: tests/policy/test_micro_batches.py
    with pytest.raises(VideoError, match=r"a\.mp4"), raise_on_all_ranks(mesh):
        raise mine


def test_other_exceptions_are_raised_at_once(mesh: Mesh) -> None:
    with pytest.raises(ZeroDivisionError), raise_on_all_ranks(mesh):
        1 / 0  # noqa: B018


def _axis(rank: int, size: int) -> Axis:
    return Axis(
        rank=rank, size=size, group=cast(dist.ProcessGroup, None)
    )  # no collective is called


@given(st.lists(st.integers()), st.integers(1, 5), st.integers(1, 3))
def test_shards_of_all_ranks_are_the_items_in_order(
    items: list[int], data: int, model: int
) -> None:
    ranks = [
        [shard(items, _axis(d, data), _axis(m, model)) for m in range(model)] for d in range(data)
    ]
    assert interleave([interleave(of_replica) for of_replica in ranks]) == items
    for d, of_replica in enumerate(ranks):
        assert interleave(of_replica) == shard(items, _axis(d, data))
