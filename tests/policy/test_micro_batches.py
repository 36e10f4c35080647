"""Micro-batches: as many on every rank, and weights that make the step one batch."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from megatron_vrl.batching.pack import Group
from megatron_vrl.config import Batch, Parallel
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh, row_tile
from megatron_vrl.policy.micro_batches import plan_batches, rebalance
from megatron_vrl.policy.micro_batches import tokens as num_tokens
from tests.running import run_python
from tests.tiny import GROUPS


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def num_targets(groups: list[Group]) -> int:
    return sum(group.num_targets for group in groups)


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_every_token_weighs_the_same_however_they_are_split(
    mesh: Mesh, tokens: int, layout: Literal["shared", "plain"]
) -> None:
    planned = plan_batches(GROUPS, GROUPS[0], Batch(tokens=tokens, layout=layout), mesh)
    assert sum(len(batch.target) for batch in planned) == num_targets(GROUPS)
    weights = np.concatenate([batch.weight for batch in planned])
    np.testing.assert_allclose(weights, 1 / num_targets(GROUPS))
    assert (len(planned) == 1) == (tokens == 10_000)


def test_seed_normalisation_is_a_mean_of_means(mesh: Mesh) -> None:
    planned = plan_batches(GROUPS, GROUPS[0], Batch(tokens=60), mesh, "temporal_r1")
    assert len(planned) > 1
    for batch in planned:
        np.testing.assert_allclose(batch.weight.sum(), 1 / len(planned), rtol=1e-6)
        assert len(set(batch.weight)) == 1


@pytest.mark.parametrize(("fp8", "sequence", "rows"), [
    ("none", True, 16), ("delayed", True, 16), ("current", True, 16),
    ("blockwise", True, 128), ("blockwise", False, 16),
])  # fmt: skip
def test_a_tensor_rank_has_whole_tiles_on_a_gpu(
    mesh: Mesh, fp8: str, sequence: bool, rows: int
) -> None:
    """Transformer Engine gathers the rows of FP8 with blockwise scaling by blocks of 128."""
    tensor = 2
    tile = row_tile(Parallel(tensor=tensor, sequence=sequence), fp8)
    on_gpus = replace(mesh, row_tile=tile, tensor=replace(mesh.tensor, size=tensor))
    for batch in plan_batches(GROUPS, GROUPS[0], Batch(tokens=60), on_gpus):
        assert len(batch.token_ids) % (tensor * rows) == 0
        assert len(batch.token_ids) < 60 + tensor * rows
    assert mesh.row_tile == 1  # this machine's kernels take any number


ANSWERS = [replace(a, id=f"{g}/{i}") for g, group in enumerate(GROUPS)
           for i, a in enumerate(group.answers)]  # fmt: skip
NAMED = [replace(g, answers=tuple(ANSWERS[3 * i : 3 * i + 3])) for i, g in enumerate(GROUPS)]
MOST = 9
EXPECTED = {  # weight of each token of an answer of R tokens
    "global_tokens": lambda length: 1 / num_targets(GROUPS),
    "sequence_mean": lambda length: 1 / (len(ANSWERS) * length),
    "sequence_sum": lambda length: 1 / len(ANSWERS),
    "constant_length": lambda length: 1 / (len(ANSWERS) * MOST),
}


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@pytest.mark.parametrize("normalisation", EXPECTED)
def test_weights_depend_on_the_answer_alone(
    mesh: Mesh, normalisation: Any, tokens: int, layout: Literal["shared", "plain"]
) -> None:
    cfg = Batch(tokens=tokens, layout=layout)
    planned = plan_batches(NAMED, NAMED[0], cfg, mesh, normalisation, max_response_tokens=MOST)
    found = {
        name: batch.weight[batch.sequence == index]
        for batch in planned
        for index, name in enumerate(batch.answer_id)
    }
    assert sorted(found) == sorted(answer.id for answer in ANSWERS)
    for answer in ANSWERS:
        length = len(answer.token_ids)
        wanted = np.full(length, EXPECTED[normalisation](length))
        np.testing.assert_allclose(found[answer.id], wanted, rtol=1e-6)
    if normalisation in ("global_tokens", "sequence_mean"):
        np.testing.assert_allclose(sum(weight.sum() for weight in found.values()), 1, rtol=1e-5)


def test_micro_batches_are_even_by_the_cost_that_is_given(mesh: Mesh) -> None:
    """Two of four groups hold most of the vision work: they are apart, at the same budget."""
    heavy = {GROUPS[1].prompt.id, GROUPS[2].prompt.id}

    def cost(group: Group) -> float:
        return 10.0 if group.prompt.id in heavy else 1.0

    planned = plan_batches(GROUPS, GROUPS[0], Batch(tokens=60), mesh, cost=cost)
    assert len(planned) == 2
    for batch in planned:
        assert batch.prompt_length.sum() + batch.answer_length.sum() <= 60
        assert len(batch.prompt_start) == 2
        seen = {visual.path for visual in batch.visuals}
        assert len(seen & {group.prompt.visuals[0].path for group in GROUPS[1:3]}) == 1


def test_the_interleaved_schedule_gets_one_length_and_whole_rounds(mesh: Mesh) -> None:
    """Three groups in rounds of two: no filler as long as a micro-batch can be cut."""
    axis = replace(mesh.pipeline, size=2, rank=0)
    staged = replace(mesh, interleaved=True, pipeline=axis)
    for tokens, count, dummy_groups in ((10_000, 2, 0), (60, 2, 0), (1, 4, 1)):
        planned = plan_batches(GROUPS[:3], GROUPS[0], Batch(tokens=tokens), staged)
        assert len(planned) == count
        assert len({len(batch.token_ids) for batch in planned}) == 1
        assert sum(not batch.weight.any() for batch in planned) == dummy_groups
        total = sum(batch.weight.sum() for batch in planned)
        np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_one_rank_keeps_its_groups(mesh: Mesh) -> None:
    assert rebalance(GROUPS, mesh, num_tokens) == GROUPS
    assert rebalance([], mesh, num_tokens) == []


def test_nothing_to_learn_is_no_batch(mesh: Mesh) -> None:
    assert plan_batches([], GROUPS[0], Batch(), mesh) == []


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    done = run_python(
        "launch/torchrun.py",
        *("--standalone", "--nproc-per-node", 2, "-m", "tests.policy.two_ranks_worker", folder),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_the_first_stage_looks_for_the_others(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["seen"] for rank in two_ranks)
    assert (len(first), len(second)) == (1, 2)
    for seen, tokens in (*first, *second):
        assert seen == tokens  # each prompt's own


@pytest.mark.slow
def test_two_ranks_share_weights_fill_up_and_fail_together(two_ranks: list[dict[str, Any]]) -> None:
    """Three groups on one rank, one on the other, each a micro-batch; then an error of one."""
    first, second = (rank["alone"] for rank in two_ranks)
    assert len(first["weights"]) == len(second["weights"]) == 3
    real = [*first["weights"], second["weights"][0]]
    packed = [*sorted(GROUPS[:3], key=lambda group: -group.num_tokens), GROUPS[3]]
    for weights, group in zip(real, packed, strict=True):
        np.testing.assert_allclose(weights, [1 / num_targets(GROUPS[:4])] * group.num_targets)
    for weights, targets in zip(second["weights"][1:], second["targets"][1:], strict=True):
        assert set(weights) == {0.0}  # fillers: one answer of the rank's own, worth nothing
        assert targets == GROUPS[3].answers[0].token_ids.tolist()
    for rank in two_ranks:
        assert rank["error"] == "b.mp4 is empty." and rank["survived"]


@pytest.mark.slow
def test_two_ranks_cut_finer_before_they_fill_up(two_ranks: list[dict[str, Any]]) -> None:
    """Two micro-batches of one rank, and two groups of the other that would fit in one."""
    for planned, own in zip((r["finer"] for r in two_ranks), (GROUPS[:2], GROUPS[2:]), strict=True):
        assert len(planned["weights"]) == 2
        assert all(min(weights) > 0 for weights in planned["weights"])
        assert sum(map(len, planned["targets"])) == num_targets(own)
    weights = [w for r in two_ranks for weights in r["finer"]["weights"] for w in weights]
    np.testing.assert_allclose(sum(weights), 1, rtol=1e-5)  # sequence_mean


@pytest.mark.slow
def test_two_ranks_hand_over_as_few_groups_as_make_them_even(
    two_ranks: list[dict[str, Any]],
) -> None:
    first, second = (rank["rebalanced"] for rank in two_ranks)
    # 26 + 31 + 27 tokens beside 15: the 31 goes over, the 26 and 27 stay
    assert [len(first["ids"]), len(second["ids"])] == [2, 2]
    assert sorted(first["ids"] + second["ids"]) == sorted(g.prompt.id for g in GROUPS)
    assert GROUPS[3].prompt.id in second["ids"]
    assert first["whole"] and second["whole"]
    assert not first["moved"] and second["moved"] == 1
    assert [first["tokens"], second["tokens"]] == [53, 46]


@pytest.mark.slow
def test_two_ranks_exchange_objects_whole_and_in_order(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["exchanged"] for rank in two_ranks)
    assert first["numbers"] == [[1, 0, 0]]  # sender, receiver, which of them
    assert second["numbers"] == [[0, 1, 0], [1, 1, 0], [1, 1, 1]]
    for rank in (first, second):
        assert rank["equal"] and rank["aligned"] and rank["views"]
