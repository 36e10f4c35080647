"""Qwen3-VL in vLLM: token ids and times of every prompt, log-probs, weights, embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_tiny_model
import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_vrl import config
from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Batch, Model, Parallel
from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.qwen3_vl.prompt import PROMPT
from megatron_vrl.parallel.mesh import init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.policy.vision_cache import VisionEmbeddingCache
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.types import EncodedVideo, Prompt, Rollout, Visual
from tests.rollout.mixed_media import mixed_prompts
from tests.tiny import present
from tests.tiny_qwen3_vl import image, video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SPEC = SamplingSpec(n=2, temperature=1.0, top_p=1.0, max_tokens=8, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three DeepStack features, as the released ones have."""
    out = tmp_path_factory.mktemp("qwen3") / "checkpoint"
    sizes = ["--layers=6", "--vision-layers=4"]
    make_tiny_model.main([f"--out={out}", "--family=qwen3_vl", *sizes])
    return out


@pytest.fixture(scope="module")
def policy_and_engine(folder: Path) -> Iterator[tuple[Policy, VllmEngine]]:
    cfg = config.RolloutConfig(max_num_seqs=16, kv_cache_mib=64)
    engine = VllmEngine(str(folder), cfg, dtype="float32", seed=1, max_model_len=256)
    mesh = init_mesh(Parallel(), seed=1)
    frozen = Model(checkpoint="", dtype="float32", freeze_vision=True, freeze_merger=True)
    policy = Policy(read_architecture(folder), frozen, Parallel(), mesh)
    load_hf_weights(policy.chunks, folder)
    engine.push_weights(WeightExport(policy.chunks).tensors(), version=1)
    yield policy, engine
    parallel_state.destroy_model_parallel()  # the process group is the engine's too


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder(folder, read_architecture(folder), "none", max_tokens=200)


@pytest.fixture(scope="module")
def prompts(encoder: PromptEncoder) -> list[Prompt]:
    """Three prompts with videos of uneven times."""
    made = []
    for seed, grid in enumerate([(4, 2, 2), (3, 4, 6), (1, 6, 2)]):
        times = np.cumsum(np.random.default_rng(seed).uniform(0.1, 2, 2 * grid[0]))
        shown = replace(video(grid, 1.0, seed), timestamps_s=times - times[0])
        made.append(encoder.encode(f"clip-{seed}", None, (shown, "when is it visible?")))
    return made


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


def test_engine_and_trainer_agree_with_pixels_and_with_embeddings(
    policy_and_engine: tuple[Policy, VllmEngine], prompts: list[Prompt]
) -> None:
    policy, engine = policy_and_engine
    pixels = engine.generate(prompts, SPEC)  # token ids and timestamps are compared there
    assert largest_gap(policy, engine, prompts, pixels) < 1e-4
    embedded = VisionEmbeddingCache(policy, 64).embed(prompts)
    assert embedded[0].visual_embeds[0].shape == (4, 4 * policy.arch.hidden)
    answers = engine.generate(embedded, SPEC)
    for ours, theirs in zip(answers, pixels, strict=True):
        assert [a.token_ids.tolist() for a in ours] == [a.token_ids.tolist() for a in theirs]
    assert largest_gap(policy, engine, embedded, answers) < 1e-4


def test_mixed_media_agree_with_pixels_and_with_embeddings(
    policy_and_engine: tuple[Policy, VllmEngine], encoder: PromptEncoder
) -> None:
    policy, engine = policy_and_engine
    prompts = mixed_prompts(encoder, video, image)
    pixels = engine.generate(prompts, SPEC)
    assert largest_gap(policy, engine, prompts, pixels) < 1e-4
    embedded = VisionEmbeddingCache(policy, 64).embed(prompts)
    answers = engine.generate(embedded, SPEC)
    for ours, theirs in zip(answers, pixels, strict=True):
        assert [a.token_ids.tolist() for a in ours] == [a.token_ids.tolist() for a in theirs]
    assert largest_gap(policy, engine, embedded, answers) < 1e-4


@pytest.mark.parametrize(
    "visuals",
    [
        [video((4, 2, 2), 0.7, 1)],
        [video((1, 6, 10), 2.0, 1), video((3, 4, 2), 0.3, 2)],
        [image((4, 8), 1), video((2, 2, 6), 1.3, 2)],
        [],
    ],
    ids=["video", "two videos", "image and video", "text"],
)
def test_positions_equal_vllm(
    policy_and_engine: tuple[Policy, VllmEngine], encoder: PromptEncoder, visuals: list[Visual]
) -> None:
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Model

    arch = policy_and_engine[0].arch
    asked = encoder.encode("one", None, (*visuals, "when is it visible?"))
    pads = [i for i, t in enumerate(asked.engine_token_ids) if t in encoder._pads]
    before = [
        PROMPT.expand(asked.engine_token_ids[:pad], visuals[:i], arch, encoder._chat.text_ids)
        for i, pad in enumerate(pads)
    ]
    vision: Any = SimpleNamespace(spatial_merge_size=arch.vision.merge)
    tokens = {
        f"{name}_token_id": getattr(arch, f"{name}_token")
        for name in ("video", "vision_start", "vision_end")
    }
    sizes: Any = SimpleNamespace(vision_config=vision, **tokens)
    wanted, delta = Model._get_mrope_input_positions(
        input_tokens=asked.token_ids.tolist(),
        mm_features=[_feature(v, len(ids)) for v, ids in zip(visuals, before, strict=True)],
        config=sizes,
    )
    np.testing.assert_array_equal(asked.positions, wanted.numpy())
    # The answer continues both: vLLM's decode step n stands at n + delta.
    assert int(asked.positions.max()) + 1 == len(asked.token_ids) + delta


def _feature(visual: Visual, offset: int) -> Any:
    """A visual as vLLM describes it, from token `offset` on."""
    from vllm.multimodal import inputs

    kind = "video" if isinstance(visual, EncodedVideo) else "image"
    field = inputs.MultiModalSharedField(batch_size=1)
    grid = inputs.MultiModalFieldElem(data=torch.tensor(visual.grid_thw), field=field)
    return inputs.MultiModalFeatureSpec(
        data=inputs.MultiModalKwargsItem({f"{kind}_grid_thw": grid}),
        modality=kind,
        identifier=str(offset),
        mm_position=inputs.PlaceholderRange(offset=offset, length=1),
    )


def test_a_prompt_with_another_time_is_refused(
    policy_and_engine: tuple[Policy, VllmEngine], prompts: list[Prompt]
) -> None:
    _, engine = policy_and_engine
    (shown,) = prompts[0].visuals
    assert isinstance(shown, EncodedVideo)
    later = replace(prompts[0], visuals=(replace(shown, timestamps_s=shown.timestamps_s + 1.0),))
    with pytest.raises(RolloutError, match=r"Sample clip-0: vLLM read other prompt tokens"):
        engine.generate([later], SPEC)


def test_every_weight_arrives_under_its_released_name(
    policy_and_engine: tuple[Policy, VllmEngine],
) -> None:
    from megatron_vrl.rollout.checksums import tensor_checksums

    policy, engine = policy_and_engine
    sent = tensor_checksums(WeightExport(policy.chunks).tensors(), engine.dtype)
    assert engine.weights_checksum() == sent
