"""Sample stream of training: sources, data.selection, curriculum, source and sample weights.

data.selection, data.curriculum and sample weights name samples by id. With one of them every record
of a pool is parsed at the start. Without, a record of an indexed pool is parsed when it is drawn.
"""

from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Data, RunConfig, Source
from megatron_vrl.context import RunContext
from megatron_vrl.data.mix import SampleStream
from megatron_vrl.data.pool import Pool
from megatron_vrl.data.sample_weights import has_weights, read_statistics, sample_weights
from megatron_vrl.data.schedule import Schedule, read_ids, read_mean_rewards, stages_of
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.parallel.mesh import raise_on_all_ranks


def open_run_pool(ctx: RunContext, sources: Sequence[Source]) -> Pool:
    """Return the pool of some sources of the run. Every rank calls it and gets the same."""
    with raise_on_all_ranks(ctx.mesh):
        return ctx.datasets.open_pool(sources, ctx.reader.duration_s)


def training_pool(ctx: RunContext) -> Pool:
    """Return the pool that GRPO draws from. Every rank calls it and gets the same."""
    pool = open_run_pool(ctx, ctx.cfg.data.train)
    with raise_on_all_ranks(ctx.mesh):
        return selected(pool, ctx.cfg.data)


def training_stream(ctx: RunContext, pool: Pool) -> SampleStream:
    """Return the stream of `training_pool`, at its start. Every rank calls it."""
    with raise_on_all_ranks(ctx.mesh):
        return ordered(pool, ctx.cfg.data, ctx.cfg.run.seed)


def stream_of(pool: Pool, data: Data, seed: int) -> SampleStream:
    """Return the stream of the selected samples of a pool, in the order of the curriculum."""
    check_records(data)
    return ordered(selected(pool, data), data, seed)


def selected(pool: Pool, data: Data) -> Pool:
    """Return the samples of a pool that data.selection keeps. Raises DataError if none is kept."""
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
    """Return the samples of a pool with one of the ids."""
    return pool.only(np.array([name in ids for name in pool.names()], dtype=bool))


def ordered(pool: Pool, data: Data, seed: int) -> SampleStream:
    """Return the stream of a pool, by data.curriculum or the sample weights."""
    if has_weights(data) and data.difficulty:
        weights = sample_weights(pool.names(), read_statistics(data.difficulty), data)
        return SampleStream(pool, seed, schedule_of(pool, data.train, seed, None, weights))
    stages = None
    if data.curriculum != "none":
        rewards = read_mean_rewards(data.difficulty)
        stages = stages_of(pool.names(), rewards, data.curriculum, data.curriculum_stages)
    return weighted(pool, data.train, seed, stages)


def weighted(
    pool: Pool, sources: Sequence[Source], seed: int, stages: NDArray[np.int64] | None = None
) -> SampleStream:
    """Return a stream that draws each source in proportion to its weight."""
    return SampleStream(pool, seed, schedule_of(pool, sources, seed, stages))


def schedule_of(
    pool: Pool,
    sources: Sequence[Source],
    seed: int,
    stages: NDArray[np.int64] | None = None,
    weights: NDArray[np.float64] | None = None,
) -> Schedule:
    """Return the order of a pool's samples, with the curriculum stage or the weight of each."""
    return Schedule(pool.sizes, [source.weight for source in sources], seed, stages, weights)


def check_records(data: Data) -> None:
    """Raises UserError if the files of data.selection or data.difficulty cannot be used."""
    if data.curriculum != "none" and not data.difficulty:
        raise ConfigError(
            f"data.curriculum={data.curriculum} needs recorded rewards: give data.difficulty."
        )
    if data.selection:
        read_ids(data.selection)
    if data.difficulty:
        read_mean_rewards(data.difficulty)
    if data.difficulty and has_weights(data):
        read_statistics(data.difficulty)


def check_sample_weights(cfg: RunConfig) -> None:
    """Raises ConfigError if samples cannot be drawn by weight."""
    if not has_weights(cfg.data):
        return
    if not cfg.data.difficulty and not cfg.selection.every_epochs:
        raise ConfigError(
            "data.sample_weight_std_power and data.sample_weight_mean_power need recorded rewards: "
            "give data.difficulty, or set selection.every_epochs."
        )
    if cfg.data.curriculum != "none":
        raise ConfigError(
            f"data.curriculum={cfg.data.curriculum} orders an epoch, and the sample weights change "
            "what it holds: set data.curriculum=none, or both powers to 0."
        )
