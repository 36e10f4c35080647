"""VisionEmbeddingCache: equal log-probs, bounded memory, no embeddings of old weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vrl.batching.pack import Answer, Group, MicroBatch
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Batch, Model, Parallel, RunConfig
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.flops import group_flops, micro_batch_flops
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.arrays import as_array, as_tensor
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.policy.vision_cache import VisionEmbeddingCache
from megatron_vrl.trainer.dry_run import check_visual_input
from megatron_vrl.types import EncodedVideo, Prompt
from tests.tiny import image, present, prompt, video
from tests.tiny_models import hf_model, save


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("cache") / "hf")


@pytest.fixture
def policy(mesh: Mesh, checkpoint: Path) -> Policy:
    cfg = Model(checkpoint=str(checkpoint), dtype="float32", freeze_vision=True, freeze_merger=True)
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    return policy


PROMPTS = [
    prompt([video((2, 4, 4), 1.0, 1)], 1),
    prompt([], 2),
    prompt([video((3, 4, 6), 0.7, 2), image((4, 4), 3)], 3),
]


def groups_of(prompts: list[Prompt]) -> list[Group]:
    answer = Answer(
        token_ids=np.arange(5), advantage=1.0, engine_logprobs=np.zeros(5, dtype=np.float32)
    )
    return [Group(prompt=one, answers=(answer, answer)) for one in prompts]


def batches_of(policy: Policy, prompts: list[Prompt]) -> list[MicroBatch]:
    groups = groups_of(prompts)
    return plan_batches(groups, groups[0], Batch(tokens=10_000), policy.mesh)


def logprobs(policy: Policy, prompts: list[Prompt]) -> torch.Tensor:
    return torch.cat(present(policy.logprobs(batches_of(policy, prompts), Distribution())))


def test_log_probs_with_embeddings_equal_those_with_pixels(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = VisionEmbeddingCache(policy, 64).embed(PROMPTS)
    assert [len(one.visual_embeds) for one in embedded] == [1, 0, 2]
    expected = logprobs(policy, PROMPTS)
    monkeypatch.setattr(policy.chunks[0].vision, "encode", None)  # the tower is not asked again
    torch.testing.assert_close(logprobs(policy, embedded), expected, rtol=1e-5, atol=1e-5)


def test_each_video_is_encoded_once(policy: Policy) -> None:
    cache = VisionEmbeddingCache(policy, 64)
    for _ in range(2):
        first, *_ = cache.embed(PROMPTS)
        assert cache.encoded == 3
    (again,) = cache.embed([replace(PROMPTS[0], id="another question")])
    assert again.visual_embeds[0] is first.visual_embeds[0] and cache.encoded == 3
    shown = PROMPTS[0].visuals[0]
    assert isinstance(shown, EncodedVideo)
    other_frames = replace(shown, frame_indices=np.arange(4) + 9)
    cache.embed([replace(PROMPTS[0], visuals=(other_frames,))])
    assert cache.encoded == 4


def test_changed_tower_weights_clear_the_cache(policy: Policy, checkpoint: Path) -> None:
    cache = VisionEmbeddingCache(policy, 64)
    (before,) = cache.embed(PROMPTS[:1])
    with torch.no_grad():
        tower = policy.chunks[0].vision
        assert tower is not None
        tower.merger.out.weight.mul_(1.5)
    (after,) = cache.embed(PROMPTS[:1])
    assert cache.epoch == 1 and not np.allclose(before.visual_embeds[0], after.visual_embeds[0])
    changed = logprobs(policy, PROMPTS[:1])
    torch.testing.assert_close(logprobs(policy, [after]), changed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logprobs(policy, [before]), changed, atol=1e-3)
    load_hf_weights(policy.chunks, checkpoint)
    (back,) = cache.embed(PROMPTS[:1])
    assert cache.epoch == 2 and np.array_equal(back.visual_embeds[0], before.visual_embeds[0])


def test_the_cache_is_bounded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vrl.policy.vision_cache.MIB", 1)
    prompts = [prompt([video((2, 4, 4), 1.0, seed)], seed) for seed in range(4)]
    (first,) = VisionEmbeddingCache(policy, 10**6).embed(prompts[:1])
    cache = VisionEmbeddingCache(policy, 2 * first.visual_embeds[0].nbytes)
    cache.embed(prompts[:2])
    cache.embed([prompts[0], prompts[2]])  # 1 was used longest ago
    assert cache.encoded == 3 and len(cache._kept) == 2
    cache.embed(prompts[:1])
    assert cache.encoded == 3
    cache.embed(prompts[1:2])
    assert cache.encoded == 4


def test_cached_videos_count_no_flops(policy: Policy) -> None:
    embedded = VisionEmbeddingCache(policy, 64).embed(PROMPTS)
    arch = policy.arch
    (batch,), (pixels,) = batches_of(policy, embedded), batches_of(policy, PROMPTS)
    ideal = sum(group_flops(arch, group).flops for group in groups_of(embedded))
    assert micro_batch_flops(arch, batch).vision == micro_batch_flops(arch, batch).merger == 0
    assert (
        micro_batch_flops(arch, pixels).vision > 0 and micro_batch_flops(arch, batch).flops >= ideal
    )


def test_a_trained_tower_is_refused() -> None:
    def config(visual_input: str) -> RunConfig:
        return RunConfig.model_validate(
            {
                "run": {"out_dir": "out"},
                "model": {"checkpoint": "c", "freeze_vision": True},
                "rollout": {"visual_input": visual_input},
            }
        )

    check_visual_input(config("pixels"))
    with pytest.raises(ConfigError, match=r"must not be trained then: set model\.freeze"):
        check_visual_input(config("embeddings"))


def test_bfloat16_arrays_keep_their_bits() -> None:
    tensor = torch.randn(3, 4).bfloat16()
    array = as_array(tensor)
    assert array.dtype == np.uint16 and torch.equal(as_tensor(array), tensor)
    assert as_array(tensor.float()).dtype == np.float32
