"""Micro-batches: as many on every rank, and weights that make the step one batch."""

import json

import numpy as np
import pytest

from megatron_vrl.config import Batch, Parallel
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.training.batches import plan_batches
from tests.conftest import run_python
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


@pytest.mark.slow
def test_two_ranks_share_weights_fill_up_and_fail_together(tmp_path):
    """Three groups on one rank, one on the other, each a micro-batch; then an error of one."""
    done = run_python(
        "launch/torchrun.py",
        *("--standalone", "--nproc-per-node", 2, "-m", "tests.training.two_ranks_worker", tmp_path),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["weights"]) == len(second["weights"]) == 3
    real = [*first["weights"], second["weights"][0]]
    packed = [*sorted(GROUPS[:3], key=lambda group: -group.num_tokens), GROUPS[3]]
    for weights, group in zip(real, packed, strict=True):
        np.testing.assert_allclose(weights, [1 / num_targets(GROUPS[:4])] * group.num_targets)
    for weights, targets in zip(second["weights"][1:], second["targets"][1:], strict=True):
        assert set(weights) == {0.0}  # fillers: one answer of the rank's own, worth nothing
        assert targets == GROUPS[3].answers[0].token_ids.tolist()
    for rank in (first, second):
        assert rank["error"] == "b.mp4 is empty." and rank["survived"]
