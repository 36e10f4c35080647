"""Vision embeddings instead of pixels: equal rollouts, and vLLM's tower never runs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Batch, Model, Parallel
from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock, mrope_positions
from megatron_vrl.parallel.mesh import init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.policy.vision_cache import VisionEmbeddingCache
from megatron_vrl.rollout.request import SamplingSpec, make_request
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.rollout.workers.protocol import GenerateRequest, decode, encode
from megatron_vrl.types import Prompt, Rollout
from tests.rollout.conftest import MakePrompt
from tests.rollout.mixed_media import mixed_prompts
from tests.tiny import image, present, video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SPEC = SamplingSpec(n=2, temperature=1.0, top_p=1.0, max_tokens=12, seed=5)


@pytest.fixture
def policy(engine: VllmEngine, checkpoint: Path) -> Iterator[Policy]:
    mesh = init_mesh(Parallel(), seed=1)
    cfg = Model(checkpoint=str(checkpoint), dtype="float32", freeze_vision=True, freeze_merger=True)
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    yield policy
    parallel_state.destroy_model_parallel()  # the process group is the engine's too


@pytest.fixture
def prompts(policy: Policy, make_prompt: MakePrompt) -> list[Prompt]:
    vision = policy.arch.vision
    placed = []
    for seed in range(3):
        prompt = make_prompt(seed)
        blocks = [VisionBlock.of(visual) for visual in prompt.visuals]
        positions = mrope_positions(
            prompt.token_ids,
            [policy.arch.video_token],
            blocks,
            merge=vision.merge,
            tokens_per_second=vision.tokens_per_second,
        )
        placed.append(replace(prompt, positions=positions))
    return placed


@pytest.fixture
def shown(engine: VllmEngine) -> list[int]:
    """A list that grows by one at each run of the engine's vision tower."""
    calls: list[int] = []

    def hook(model: Any) -> None:
        model.visual.register_forward_pre_hook(lambda *_: calls.append(1))

    engine._llm.apply_model(hook)
    return calls


def largest_gap(
    policy: Policy, engine: VllmEngine, prompts: list[Prompt], answers: Sequence[Sequence[Rollout]]
) -> float:
    """Return the largest difference of the trainer's and the engine's log-prob of a token."""
    groups = [
        Group(
            prompt=prompt,
            answers=tuple(
                Answer(token_ids=a.token_ids, advantage=0.0, engine_logprobs=a.logprobs)
                for a in rollouts
            ),
        )
        for prompt, rollouts in zip(prompts, answers, strict=True)
    ]
    batches = plan_batches(groups, groups[0], Batch(tokens=10_000), policy.mesh)
    of = Distribution(temperature=SPEC.temperature, banned=engine.banned_token_ids)
    pairs = zip(present(policy.logprobs(batches, of)), batches, strict=True)
    return max(float(np.abs(ours.numpy() - b.engine_logprob).max()) for ours, b in pairs)


def test_one_encoding_serves_engine_reference_and_update(
    policy: Policy, engine: VllmEngine, prompts: list[Prompt], shown: list[int]
) -> None:
    pixels = engine.generate(prompts, SPEC)
    assert len(shown) > 0
    cache, before = VisionEmbeddingCache(policy, 64), len(shown)
    embedded = cache.embed(prompts)
    answers = engine.generate(embedded, SPEC)
    for ours, theirs in zip(answers, pixels, strict=True):
        assert [a.token_ids.tolist() for a in ours] == [a.token_ids.tolist() for a in theirs]
    policy.keep_reference()
    assert largest_gap(policy, engine, embedded, answers) < 1e-4
    assert len(shown) == before and cache.encoded == len(prompts)


def test_textual_timestamps_are_one_encoding_for_engine_and_trainer(
    policy: Policy, engine: VllmEngine, checkpoint: Path
) -> None:
    """vLLM derives tokens and grid of every step as the trainer does, or `generate` raises."""
    encoder = PromptEncoder(checkpoint, policy.arch, "none", 250, timestamps="interleaved")
    steps = [video((steps, 4, 6), 0.7, seed=steps) for steps in (1, 3, 5)]
    prompts = [encoder.encode(f"{v.path}", None, (v, "When?")) for v in steps]
    answers = engine.generate(prompts, SPEC)
    policy.keep_reference()
    assert largest_gap(policy, engine, prompts, answers) < 1e-4
    embedded = engine.generate(VisionEmbeddingCache(policy, 64).embed(prompts), SPEC)
    for ours, theirs in zip(embedded, answers, strict=True):
        assert [a.token_ids.tolist() for a in ours] == [a.token_ids.tolist() for a in theirs]


def test_mixed_media_agree_with_pixels_and_with_embeddings(
    policy: Policy, engine: VllmEngine, checkpoint: Path
) -> None:
    encoder = PromptEncoder(checkpoint, policy.arch, "none", 200)
    prompts = mixed_prompts(encoder, video, image)
    pixels = engine.generate(prompts, SPEC)
    policy.keep_reference()
    assert largest_gap(policy, engine, prompts, pixels) < 1e-4
    embedded = VisionEmbeddingCache(policy, 64).embed(prompts)
    answers = engine.generate(embedded, SPEC)
    for ours, theirs in zip(answers, pixels, strict=True):
        assert [a.token_ids.tolist() for a in ours] == [a.token_ids.tolist() for a in theirs]


def test_a_changed_tower_changes_the_rollouts(
    policy: Policy, engine: VllmEngine, prompts: list[Prompt], shown: list[int]
) -> None:
    cache = VisionEmbeddingCache(policy, 64)
    before = engine.generate(cache.embed(prompts), SPEC)
    with torch.no_grad():
        tower = policy.chunks[0].vision
        assert tower is not None
        tower.merger.out.weight.mul_(-1.5)
    engine.push_weights(WeightExport(policy.chunks).tensors(), version=2)
    embedded = cache.embed(prompts)
    after = engine.generate(embedded, SPEC)
    assert cache.epoch == 1 and cache.encoded == 2 * len(prompts) and not shown
    assert largest_gap(policy, engine, embedded, after) < 1e-4
    first = [np.concatenate([a.logprobs for rs in made for a in rs]) for made in (before, after)]
    assert first[0].shape != first[1].shape or np.abs(first[0] - first[1]).max() > 1e-2


def test_embeddings_are_sent_to_workers_without_pixels(
    policy: Policy, prompts: list[Prompt]
) -> None:
    (embedded,) = VisionEmbeddingCache(policy, 64).embed(prompts[:1])
    ask = GenerateRequest(request=make_request(embedded), spec=SPEC.for_prompt(0), version=0)
    (video,) = decode(encode(ask), GenerateRequest).request.visuals
    assert video.frames.size == 0 and video.embeddings is not None
    assert np.array_equal(video.embeddings, embedded.visual_embeds[0])
    plain = GenerateRequest(request=make_request(prompts[0]), spec=SPEC.for_prompt(0), version=0)
    (video,) = decode(encode(plain), GenerateRequest).request.visuals
    assert video.embeddings is None and np.array_equal(video.frames, prompts[0].visuals[0].frames)
