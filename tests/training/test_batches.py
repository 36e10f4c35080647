"""Micro-batches: as many on every rank, and weights that make the step one batch."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_vrl.config import Batch, Parallel
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.training import batches
from megatron_vrl.training.batches import plan_batches
from tests.tiny import GROUPS


@pytest.fixture(scope="module")
def mesh():
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def num_targets(groups):
    return sum(group.num_targets for group in groups)


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_every_token_weighs_the_same_however_they_are_split(mesh, tokens, layout):
    planned = plan_batches(GROUPS, GROUPS[0], Batch(tokens=tokens, layout=layout), mesh)
    assert sum(len(batch.target) for batch in planned) == num_targets(GROUPS)
    weights = np.concatenate([batch.weight for batch in planned])
    np.testing.assert_allclose(weights, 1 / num_targets(GROUPS))
    assert (len(planned) == 1) == (tokens == 10_000)


def test_seed_normalisation_is_a_mean_of_means(mesh):
    planned = plan_batches(GROUPS, GROUPS[0], Batch(tokens=60), mesh, "seed")
    assert len(planned) > 1
    for batch in planned:
        np.testing.assert_allclose(batch.weight.sum(), 1 / len(planned), rtol=1e-6)
        assert len(set(batch.weight)) == 1


def test_nothing_to_learn_is_no_batch(mesh):
    assert plan_batches([], GROUPS[0], Batch(), mesh) == []


def test_a_rank_with_less_work_gets_fillers_that_weigh_nothing(mesh, monkeypatch):
    """What the ranks tell each other is given here; two real ranks are in tests/model."""
    told = []

    def other_rank(axis, mine):
        told.append(mine)
        return [mine, (4, 100)]

    monkeypatch.setattr(batches, "gather_objects", other_rank)
    planned = plan_batches(GROUPS[:2], GROUPS[3], Batch(tokens=10_000), mesh)
    assert told == [(1, num_targets(GROUPS[:2]))]
    assert len(planned) == 4
    np.testing.assert_allclose(planned[0].weight, 1 / (100 + num_targets(GROUPS[:2])))
    for filler in planned[1:]:
        assert not filler.weight.any()
        first = replace(GROUPS[3], answers=GROUPS[3].answers[:1])
        assert filler.target.tolist() == first.answers[0].token_ids.tolist()
