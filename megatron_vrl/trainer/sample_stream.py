"""The samples that training takes: sources, what a selection keeps of them, and their order.

A selection and a curriculum go by ids, so with one of them every record of a pool is parsed once at
the start; without, none before its turn.
"""

from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Data, Source
from megatron_vrl.context import RunContext
from megatron_vrl.data.mix import SampleStream, open_pool
from megatron_vrl.data.pool import Pool
from megatron_vrl.data.schedule import Schedule, read_ids, read_mean_rewards, stages_of
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.parallel.mesh import raise_on_all_ranks


def open_run_pool(ctx: RunContext, sources: Sequence[Source]) -> Pool:
    """Return the pool of some sources of the run. Every rank calls it and gets the same."""
    with raise_on_all_ranks(ctx.mesh):
        return open_pool(sources, ctx.cfg.run.seed, ctx.reader.duration_s)


def training_pool(ctx: RunContext) -> Pool:
    """Return the pool that GRPO draws from. Every rank calls it and gets the same."""
    pool = open_run_pool(ctx, ctx.cfg.data.train)
    with raise_on_all_ranks(ctx.mesh):
        return selected(pool, ctx.cfg.data)


def training_stream(ctx: RunContext, pool: Pool) -> SampleStream:
    """Of `training_pool`, at its start. Every rank calls it."""
    with raise_on_all_ranks(ctx.mesh):
        return ordered(pool, ctx.cfg.data, ctx.cfg.run.seed)


def stream_of(pool: Pool, data: Data, seed: int) -> SampleStream:
    return ordered(selected(pool, data), data, seed)


def selected(pool: Pool, data: Data) -> Pool:
    """As far as data.selection keeps it."""
    check_records(data)
    if data.selection:
        ids = read_ids(data.selection)
        pool = only(pool, ids)
        if not len(pool):
            raise DataError(
                f"data.selection={data.selection} keeps none of the samples of data.train: make it "
                "from the same sources."
            )
    return pool


def only(pool: Pool, ids: Set[str]) -> Pool:
    return pool.only(np.array([name in ids for name in pool.names()], dtype=bool))


def ordered(pool: Pool, data: Data, seed: int) -> SampleStream:
    stages = None
    if data.curriculum != "none":
        rewards = read_mean_rewards(data.difficulty)
        stages = stages_of(pool.names(), rewards, data.curriculum, data.curriculum_stages)
    return weighted(pool, data.train, seed, stages)


def weighted(
    pool: Pool, sources: Sequence[Source], seed: int, stages: NDArray[np.int64] | None = None
) -> SampleStream:
    """A stream in which each source comes as often as its weight says."""
    return SampleStream(pool, seed, schedule_of(pool, sources, seed, stages))


def schedule_of(
    pool: Pool, sources: Sequence[Source], seed: int, stages: NDArray[np.int64] | None = None
) -> Schedule:
    return Schedule(pool.sizes, [source.weight for source in sources], seed, stages)


def check_records(data: Data) -> None:
    """Raises UserError if what a selection or a curriculum goes by is not there."""
    if data.curriculum != "none" and not data.difficulty:
        raise ConfigError(
            f"data.curriculum={data.curriculum} needs recorded rewards: give data.difficulty."
        )
    if data.selection:
        read_ids(data.selection)
    if data.difficulty:
        read_mean_rewards(data.difficulty)
