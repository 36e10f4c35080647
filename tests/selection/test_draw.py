"""A budget filled around a wanted mean and by duration."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from megatron_vrl.config import Selection
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.selection.rules import KEPT, Candidate, Spread, select

TIMELENS: dict[str, Any] = {
    "gaussian_filter_mean": 0.05,
    "gaussian_filter_std": 0.2,
    "min_std": 0,
    "min_mean": 0,
}


def candidates(means: Any, duration_s: Any = 10.0) -> list[Candidate]:
    durations_s = np.broadcast_to(duration_s, len(means))
    return [
        Candidate(
            id=f"v/{index}",
            task="temporal_grounding",
            components={"temporal_iou": Spread(mean=float(mean), std=0.1 + index / 1e4)},
            reward=Spread(mean=float(mean), std=0.1),
            unreadable=0.0,
            duration_s=float(length_s),
        )
        for index, (mean, length_s) in enumerate(zip(means, durations_s, strict=True))
    ]


def kept(found: list[Candidate]) -> list[int]:
    return [int(c.id.partition("/")[2]) for c in found if c.verdict == KEPT]


def test_drawn_means_follow_the_density_where_the_pool_is_uneven() -> None:
    """The pool has 9,000 samples at 0.6 and 1,000 each at 0.05 and 0.25. The drawn shares are those
    of the density: exp(-(0.55 / 0.2)^2 / 2), exp(0) and exp(-1/2)."""
    means = np.repeat([0.6, 0.05, 0.25], [9000, 1000, 1000])
    rule = Selection(budget=200, **TIMELENS)
    counts = np.zeros(3)
    for seed in range(10):
        chosen = np.array(kept(select(candidates(means), rule, [seed])))
        assert len(chosen) == 200
        counts += np.bincount((chosen >= 9000).astype(int) + (chosen >= 10000), minlength=3)
    wanted = np.exp([-0.5 * 2.75**2, 0.0, -0.5])
    np.testing.assert_allclose(counts / counts.sum(), wanted / wanted.sum(), atol=0.05)


def test_the_draw_depends_on_the_seed_alone() -> None:
    pool, rule = candidates(np.linspace(0, 1, 50)), Selection(budget=20, **TIMELENS)
    first = kept(select(pool, rule, [1]))
    assert first == kept(select(pool, rule, [1])) != kept(select(pool, rule, [2]))
    assert kept(select(pool, rule.model_copy(update={"budget": 60}), [1])) == list(range(50))


def test_buckets_of_duration_share_the_budget() -> None:
    durations_s = np.repeat([10.0, 30.0, 45.0, 500.0], [40, 10, 20, 3])
    pool = candidates(np.full(73, 0.5), durations_s)
    for rule in (
        Selection(budget=30, duration_buckets_s=[30, 60]),
        Selection(budget=30, duration_buckets_s=[30, 60], **TIMELENS),
    ):
        chosen = kept(select(pool, rule))
        # [.., 30], (30, 60], (60, ..]: 50, 20 and 3 samples; 10 for each at most
        assert Counter(np.searchsorted([50, 70], chosen, side="right")) == {0: 10, 1: 10, 2: 3}
    most_spread = kept(select(pool, Selection(budget=30, duration_buckets_s=[30, 60])))
    assert most_spread == [*range(40, 50), *range(60, 70), 70, 71, 72]
    whole = Selection(budget=1000, duration_buckets_s=[30, 60])
    assert len(kept(select(pool, whole))) == 73


def test_what_cannot_be_divided_is_refused() -> None:
    pool = candidates([0.5])
    with pytest.raises(ConfigError, match=r"divide selection\.budget, which is 0"):
        select(pool, Selection(gaussian_filter_std=0.2))
    with pytest.raises(ConfigError, match=r"duration_buckets_s=\[60\.0, 30\.0\] must increase"):
        select(pool, Selection(budget=1, duration_buckets_s=[60, 30]))
    old = [Candidate(**{**{n: getattr(pool[0], n) for n in pool[0].__slots__}, "duration_s": None})]
    with pytest.raises(DataError, match=r"answers to sample v/0 have no duration"):
        select(old, Selection(budget=1, duration_buckets_s=[30]))
