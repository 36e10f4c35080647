"""Scored groups -> advantages of the whole step, and what is left out of training."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_vrl.algorithms import has_signal
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Algorithm, Batch, Model, Parallel, RolloutConfig
from megatron_vrl.context import RunContext
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.trainer import experience
from megatron_vrl.trainer.metrics import answer_metrics
from megatron_vrl.types import (
    AnnotatedAnswer,
    Experience,
    RewardComponent,
    Rollout,
    Sample,
    ScoredGroup,
    VideoClip,
)
from tests.tiny import present, prompt, video
from tests.tiny_models import hf_model, save


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def scored(name: str, rewards: list[float], lengths: list[int] | None = None) -> ScoredGroup:
    lengths = lengths or [4] * len(rewards)
    return ScoredGroup(
        sample=Sample(
            id=name,
            task="temporal_grounding",
            media=(VideoClip("v.mp4"),),
            duration_s=10.0,
            query="a square",
            rationale="",
            intervals_s=((1.0, 2.0),),
            options=(),
            option="",
        ),
        prompt=prompt([video((1, 2, 2), 1.0, 0)], 0),
        rollouts=tuple(
            Rollout(
                token_ids=np.arange(n),
                logprobs=np.zeros(n, dtype=np.float32),
                text="",
                finish="length" if n == 8 else "stop",
                weight_version=0,
                newest_version=0,
                seed=0,
            )
            for n in lengths
        ),
        components={
            "format": RewardComponent(np.array(rewards), 0.5),
            "temporal_iou": RewardComponent(np.array(rewards), 0.5),
        },
    )


def judged(ctx: RunContext, groups: list[ScoredGroup]) -> tuple[list[Experience], tuple[str, ...]]:
    return experience._with_advantages(ctx, experience._with_kl(ctx, groups, dummy_group=groups[0]))


def ctx_of(mesh: Mesh, **algorithm: Any) -> RunContext:
    cfg = SimpleNamespace(
        algorithm=Algorithm(**{"kl": 0.0, **algorithm}),
        rollout=RolloutConfig(max_response_tokens=8),
    )
    return cast(RunContext, SimpleNamespace(cfg=cfg, mesh=mesh))


def test_a_group_with_an_invalid_reward_is_dropped_and_named(mesh: Mesh) -> None:
    groups = [scored("a", [0.0, 1.0]), scored("b", [np.nan, 1.0]), scored("c", [0.5, 0.5])]
    found, invalid = judged(ctx_of(mesh), groups)
    assert invalid == ("b",)
    assert [e.scored.sample.id for e in found] == ["a", "c"]
    assert [has_signal(e.advantages) for e in found] == [True, False]


def test_cut_off_answers_count_in_the_statistics_but_not_in_the_loss(mesh: Mesh) -> None:
    group = scored("a", [0.0, 1.0, 0.2], lengths=[4, 8, 3])
    [found], _ = judged(ctx_of(mesh), [group])
    whole, cut = (experience.training_group(found, drop) for drop in (False, True))
    assert [a.id for a in whole.answers] == ["a#0", "a#1", "a#2"]
    assert [a.id for a in cut.answers] == ["a#0", "a#2"]
    assert [a.advantage for a in cut.answers] == [a.advantage for a in whole.answers[::2]]


def test_the_annotation_is_trained_on_as_an_answer_that_no_engine_sampled(mesh: Mesh) -> None:
    """A group of equal rewards has a signal with it."""
    annotation = AnnotatedAnswer(
        token_ids=np.array([7, 8]), rewards={"format": 1.0, "temporal_iou": 1.0}
    )
    group = replace(scored("a", [0.5, 0.5]), annotation=annotation)
    ctx = ctx_of(mesh, name="dr_grpo", ground_truth_answer="in_group")
    [found], _ = judged(ctx, [group])
    assert has_signal(found.advantages)
    first, second, last = experience.training_group(found).answers
    assert first.advantage == second.advantage == pytest.approx(-1 / 6)
    assert last.id == "a#annotation" and last.advantage == pytest.approx(1 / 3)
    assert last.token_ids.tolist() == [7, 8] and np.isnan(last.engine_logprobs).all()
    metrics = answer_metrics(ctx, [found], version=0)
    assert metrics["reward/mean"] == pytest.approx(0.5)  # of the sampled answers alone


def test_groups_in_which_no_answer_overlaps_the_truth_are_counted(mesh: Mesh) -> None:
    groups = [scored("a", [0.0, 0.0]), scored("b", [0.0, 1.0]), scored("c", [0.0, 0.0])]
    choice = RewardComponent(np.zeros(2), 1.0)
    groups += [replace(scored("d", [0.0, 0.0]), components={"accuracy": choice})]
    metrics = answer_metrics(ctx_of(mesh), judged(ctx_of(mesh), groups)[0], version=0)
    assert metrics["rollout/zero_iou_groups"] == 2 / 3  # "d" has no intervals
    assert metrics["rollout/zero_variance_groups"] == 3 / 4
    without = answer_metrics(ctx_of(mesh), judged(ctx_of(mesh), groups[3:])[0], version=0)
    assert "rollout/zero_iou_groups" not in without


def test_components_without_weight_do_not_count(mesh: Mesh) -> None:
    group = replace(
        scored("a", [0.0, 1.0]),
        components={
            "format": RewardComponent(np.ones(2), 1.0),
            "temporal_iou": RewardComponent(np.array([0.0, 1.0]), 0.0),
        },
    )
    [found], _ = judged(ctx_of(mesh), [group])
    assert not has_signal(found.advantages)


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_kl_in_the_reward_is_the_sum_over_each_answer(
    mesh: Mesh, tmp_path: Path, tokens: int
) -> None:
    """Compare with the reference's log-probs of every answer by itself; a sample may come twice."""
    checkpoint = save(hf_model(), tmp_path / "hf")
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.keep_reference()
    groups = [scored("a", [0.0, 1.0], [4, 2]), scored("a", [0.0, 0.0, 0.0], [1, 8, 3])]
    ctx = ctx_of(mesh, kl=0.5, kl_estimator="k1", kl_in="reward")
    ctx.cfg.batch = Batch(tokens=tokens)
    vars(ctx)["policy"] = policy
    vars(ctx)["rollout_manager"] = SimpleNamespace(banned_token_ids=())  # all that is asked
    with_kl = experience._with_kl(ctx, groups, dummy_group=groups[0])
    metrics = answer_metrics(ctx, judged(ctx, groups)[0], version=0)
    kl = np.concatenate([group.components["kl"].values for group in with_kl])
    task = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
    assert metrics["reward/kl"] == kl.mean()  # what is trained is what is logged
    assert metrics["reward/mean"] == pytest.approx((task + 0.5 * kl).mean(), rel=1e-12)
    for group, of_group in zip(groups, [group.components for group in with_kl], strict=True):
        assert list(of_group) == ["format", "temporal_iou", "kl"]
        assert of_group["kl"].weight == 0.5
        whole, _ = judged(ctx_of(mesh), [group])
        for answer, found in zip(
            experience.training_group(whole[0]).answers, of_group["kl"].values, strict=True
        ):
            alone = replace(experience.training_group(whole[0]), answers=(answer,))
            batches = plan_batches([alone], alone, Batch(), mesh)
            [kept] = present(policy.logprobs(batches, Distribution()))
            wanted = (answer.engine_logprobs - kept.numpy()).sum()
            assert wanted > 1 and found == pytest.approx(-wanted, rel=1e-5)
