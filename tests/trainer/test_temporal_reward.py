"""The component `temporal` of TaRO, on log-probs of a real model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Batch, Model, Parallel, Rewards, Run
from megatron_vrl.data.shuffled_frames import boundaries_shuffled
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.trainer import experience
from megatron_vrl.types import Experience, RewardComponent, ScoredGroup
from tests.tiny import present, prompt, video
from tests.tiny_models import hf_model, save
from tests.trainer.test_experience import ctx_of, scored


def group_of(name: str, lengths: list[int], ious: list[float], seed: int) -> ScoredGroup:
    shown = prompt([video((8, 4, 4), 1.0, seed)], seed)
    group = scored(name, ious, lengths)
    rollouts = tuple(replace(r, seed=10 * seed + i) for i, r in enumerate(group.rollouts))
    return replace(group, prompt=shown, rollouts=rollouts)


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_the_drop_is_that_of_the_answers_own_logprobs(tmp_path: Path, tokens: int) -> None:
    mesh = init_mesh(Parallel(), seed=1)
    checkpoint = save(hf_model(), tmp_path / "hf")
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    groups = [
        group_of("a", [4, 2, 6], [0.9, 0.8, 0.2], seed=1),
        group_of("b", [1, 8, 3], [0.7, 1.0, 0.75], seed=2),
    ]
    choice = replace(groups[0], components={"accuracy": RewardComponent(np.zeros(3), 1.0)})
    ctx = ctx_of(mesh)
    ctx.cfg.batch, ctx.cfg.run = Batch(tokens=tokens), Run(out_dir="a")
    ctx.cfg.rewards = Rewards(temporal="shuffled_boundaries")
    vars(ctx)["policy"] = policy
    vars(ctx)["rollout_manager"] = SimpleNamespace(banned_token_ids=())  # all that is asked
    *found, unchanged = experience._with_temporal(ctx, [*groups, choice], groups[0])
    assert unchanged is choice
    earned = 0.0
    for group, of_group in zip(groups, found, strict=True):
        seed = (ctx.cfg.run.seed, group.rollouts[0].seed)
        asked = boundaries_shuffled(group.prompt, group.sample, seed)
        drops = []
        for rollout in group.rollouts:
            alone = experience.training_group(
                Experience(
                    scored=replace(group, prompt=asked, rollouts=(rollout,)),
                    advantages=np.zeros(1),
                )
            )
            [kept] = present(
                policy.logprobs(plan_batches([alone], alone, Batch(), mesh), Distribution())
            )
            drops.append((rollout.logprobs - kept.numpy()).mean())
        ious = group.components["temporal_iou"].values
        wanted = (np.array(drops) > np.mean(drops)) & (ious >= 0.7)
        component = of_group.components["temporal"]
        assert component.values.tolist() == wanted.astype(float).tolist()
        assert component.weight == 0.3
        earned += component.values.sum()
    assert 0 < earned < 6
    close_mesh()
