"""VllmEngine with real vLLM, compared with the model of transformers."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn
from transformers import PreTrainedTokenizerBase

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.request import SamplingSpec, make_request
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.types import EncodedVideo, Prompt, Rollout
from tests.rollout.conftest import MakePrompt, Weights

pytestmark = pytest.mark.slow
BATCH_TOLERANCE = 1e-5  # of a float32 log-prob, see docs/rollouts.md


def spec(
    n: int = 4, temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 16, seed: int = 0
) -> SamplingSpec:
    return SamplingSpec(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)


class HFModel:
    """Model of transformers as the reference for log-probs, with Qwen2.5-VL's positions."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoVideoProcessor, Qwen2_5_VLForConditionalGeneration

        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.processor = AutoVideoProcessor.from_pretrained(checkpoint)

    def load(self, weights: Weights) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration as Model

        memory_names = {
            name: name.replace("visual.", "model.visual.", 1)
            if name.startswith("visual.")
            else name.replace("model.", "model.language_model.", 1)
            for name in weights
        }
        assert isinstance(self.model, Model)
        self.model.load_state_dict({memory_names[name]: t for name, t in weights.items()})

    @torch.no_grad()
    def logits(self, prompt: Prompt, answer: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the logits [R, vocabulary] that each token of the response was sampled from."""
        (video,) = prompt.visuals
        frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
        pixels = self.processor(frames, do_resize=False, return_tensors="pt")
        assert pixels["video_grid_thw"].tolist() == [list(video.grid_thw)]
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, answer]))
        logits: torch.Tensor = self.model(
            input_ids=ids[None],
            position_ids=_positions(prompt, len(answer))[:, None],
            **pixels,
        ).logits[0]
        return logits[len(prompt.token_ids) - 1 : -1]


def _positions(prompt: Prompt, num_answer_tokens: int) -> torch.Tensor:
    """Return positions [3, P + R]. Text continues after the largest position of a video."""
    (video,) = prompt.visuals
    assert isinstance(video, EncodedVideo)
    steps, height, width = video.grid_thw
    video_token = np.bincount(prompt.token_ids).argmax()
    start = int(np.flatnonzero(prompt.token_ids == video_token)[0])
    grid = np.indices((steps, height // 2, width // 2)).reshape(3, -1)
    step = float(np.float32(video.seconds_per_grid)) * 2  # vLLM keeps 32 bits of it
    grid[0] = (grid[0] * step).astype(int)
    grid += start
    num_after = len(prompt.token_ids) + num_answer_tokens - start - grid.shape[1]
    after = grid.max() + 1 + np.arange(num_after)
    return torch.from_numpy(
        np.concatenate([np.tile(np.arange(start), (3, 1)), grid, np.tile(after, (3, 1))], axis=1)
    )


@pytest.fixture(scope="module")
def hf_model(checkpoint: Path) -> HFModel:
    return HFModel(checkpoint)


def largest_gap(
    hf_model: HFModel,
    engine: VllmEngine,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Rollout]],
    temperature: float = 1.0,
) -> float:
    gaps = []
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            logits = hf_model.logits(prompt, rollout.token_ids)
            logits[:, list(engine.banned_token_ids)] = -torch.inf
            logprobs = (logits / temperature).log_softmax(-1)
            chosen = logprobs.gather(1, torch.from_numpy(rollout.token_ids)[:, None])[:, 0]
            gaps.append((chosen - torch.from_numpy(rollout.logprobs)).abs().max().item())
    return max(gaps)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers(
    engine: VllmEngine,
    hf_model: HFModel,
    weights: Weights,
    make_prompt: MakePrompt,
    temperature: float,
) -> None:
    hf_model.load(weights)
    prompts = [make_prompt(0), make_prompt(1, (2, 4, 4), 1.0), make_prompt(2, (7, 4, 10), 0.7)]
    groups = engine.generate(prompts, spec(temperature=temperature))
    assert [len(group) for group in groups] == [4, 4, 4]
    assert largest_gap(hf_model, engine, prompts, groups, temperature) < 1e-4


def test_new_weights_apply_to_a_cached_video(
    engine: VllmEngine,
    hf_model: HFModel,
    weights: Weights,
    make_prompt: MakePrompt,
) -> None:
    prompts = [make_prompt(0), make_prompt(1)]
    old = engine.generate(prompts, spec())
    vision_changed = {
        name: tensor * 1.3 if name.startswith("visual.") else tensor
        for name, tensor in weights.items()
    }
    engine.push_weights(vision_changed.items(), version=2)
    new = engine.generate(prompts, spec())
    hf_model.load(vision_changed)
    assert largest_gap(hf_model, engine, prompts, new) < 1e-4
    hf_model.load(weights)
    assert largest_gap(hf_model, engine, prompts, new) > 1e-2  # so the line above can fail
    engine.push_weights(weights.items(), version=3)
    again = engine.generate(prompts, spec())
    assert [r.token_ids.tolist() for g in again for r in g] == [
        r.token_ids.tolist() for g in old for r in g
    ]
    versions = [{r.weight_version for g in groups for r in g} for groups in (old, new, again)]
    assert versions == [{1}, {2}, {3}]


def test_banned_tokens_never_occur(
    engine: VllmEngine,
    hf_model: HFModel,
    weights: Weights,
    make_prompt: MakePrompt,
) -> None:
    prompts = [make_prompt(0), make_prompt(1)]
    banned = list(engine.banned_token_ids)
    boosted = dict(weights)
    boosted["lm_head.weight"] = weights["lm_head.weight"].clone()
    boosted["lm_head.weight"][banned] *= 100
    engine.push_weights(boosted.items(), version=2)
    groups = engine.generate(prompts, spec(n=8))
    hf_model.load(boosted)
    first = hf_model.logits(prompts[0], groups[0][0].token_ids)
    assert (
        np.isin(first.argmax(-1).numpy(), banned).mean() > 0.5
    )  # without the ban they would occur
    tokens = np.concatenate([r.token_ids for g in groups for r in g])
    assert not np.isin(tokens, banned).any()


def test_a_rollout_ends_with_a_stop_token_or_at_the_limit(
    engine: VllmEngine,
    weights: Weights,
    make_prompt: MakePrompt,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    eager = dict(weights)
    eager["lm_head.weight"] = weights["lm_head.weight"].clone()
    eager["lm_head.weight"][stops] *= 4  # both finish reasons become frequent
    engine.push_weights(eager.items(), version=2)
    groups = engine.generate([make_prompt(seed) for seed in range(4)], spec(n=16))
    rollouts = [rollout for group in groups for rollout in group]
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        is_stop = np.isin(rollout.token_ids, stops)
        assert not is_stop[:-1].any()
        assert is_stop[-1] == (rollout.finish == "stop")
        assert rollout.finish == "stop" or len(rollout.token_ids) == 16
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert "<|" not in rollout.text


def test_checksums_read_the_live_weights(engine: VllmEngine, weights: Weights) -> None:
    assert engine.weights_checksum() == tensor_checksums(weights.items(), torch.float32)
    for name in (
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "visual.blocks.1.attn.qkv.weight",
        "visual.patch_embed.proj.weight",
    ):
        changed = dict(weights)
        changed[name] = weights[name].clone()
        changed[name].view(-1)[3] += 1e-3
        engine.push_weights(changed.items(), version=2)
        live = engine.weights_checksum()
        expected = tensor_checksums(weights.items(), torch.float32)
        assert {key for key in live if live[key] != expected[key]} == {name}


def test_the_loader_runs_only_in_the_first_sync(engine: VllmEngine, weights: Weights) -> None:
    """The second weight sync repeats the copies that vLLM's loader made in the first."""
    changed = {name: tensor * 1.5 for name, tensor in weights.items()}
    calls: list[object] = []
    engine._llm.apply_model(lambda model: setattr(model, "load_weights", calls.append))
    try:
        engine.push_weights(changed.items(), version=2)
    finally:
        engine._llm.apply_model(lambda model: delattr(model, "load_weights"))
    assert not calls
    assert engine.weights_checksum() == tensor_checksums(changed.items(), torch.float32)


def test_one_vision_pass_per_prompt(engine: VllmEngine, make_prompt: MakePrompt) -> None:
    prompts = [make_prompt(0), make_prompt(1, (2, 4, 4))]
    rows = []
    hooks = engine._llm.apply_model(
        lambda model: model.visual.register_forward_pre_hook(
            lambda _, inputs: rows.append(len(inputs[0]))
        )
    )
    engine.generate(prompts, spec(n=8))
    hooks[0].remove()
    assert sum(rows) == sum(int(np.prod(prompt.visuals[0].grid_thw)) for prompt in prompts)


def test_a_seed_repeats_and_the_trainer_keeps_its_state(
    engine: VllmEngine, weights: Weights, make_prompt: MakePrompt
) -> None:
    def state() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.set_num_threads.__name__,
        )

    def tokens(seed: int) -> list[list[list[int]]]:
        groups = engine.generate([make_prompt(0)], spec(seed=seed))
        return [rollout.token_ids.tolist() for rollout in groups[0]]

    before = state()
    first = tokens(3)
    engine.push_weights(weights.items(), version=2)
    assert tokens(3) == first
    assert tokens(4) != first
    assert len({tuple(answer) for answer in first}) == len(first)
    assert state() == before


def test_earlier_requests_change_no_bit_of_later_rollouts(
    engine: VllmEngine, make_prompt: MakePrompt
) -> None:
    """A cached prefix or video would change the number of rows, which some kernels round by."""
    rows = []

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    parts = [engine._llm.apply_model(get)[0] for get in (_vision_tower, _first_norm)]
    hooks = [part.register_forward_pre_hook(count) for part in parts]

    def answered() -> tuple[list[tuple[list[int], list[float]]], list[int]]:
        rows.clear()
        groups = engine.generate([make_prompt(0), make_prompt(1)], spec(n=2, seed=7))
        values = [(r.token_ids.tolist(), r.logprobs.tolist()) for group in groups for r in group]
        return values, list(rows)

    fresh = answered()
    engine.generate([make_prompt(1), make_prompt(2)], spec(n=3))  # shares text and a video
    assert answered() == fresh
    engine.submit("dropped", make_request(make_prompt(0)), spec())
    engine.step()
    engine.abort(["dropped"])
    assert answered() == fresh
    assert sum(fresh[1]) > 100
    for hook in hooks:
        hook.remove()


def _vision_tower(model: Any) -> torch.nn.Module:
    tower: torch.nn.Module = model.visual
    return tower


def _first_norm(model: Any) -> torch.nn.Module:
    norm: torch.nn.Module = model.language_model.model.layers[0].input_layernorm
    return norm


def test_other_prompts_in_the_batch_change_log_probs_only_by_rounding(
    engine: VllmEngine, make_prompt: MakePrompt
) -> None:
    [alone] = engine.generate([make_prompt(0)], spec(seed=7))
    beside, _, _ = engine.generate([make_prompt(i) for i in range(3)], spec(seed=7))
    assert [r.token_ids.tolist() for r in beside] == [r.token_ids.tolist() for r in alone]
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=BATCH_TOLERANCE)


def test_greedy_takes_the_most_likely_token(
    engine: VllmEngine,
    hf_model: HFModel,
    weights: Weights,
    make_prompt: MakePrompt,
) -> None:
    hf_model.load(weights)
    prompt = make_prompt(0)
    [[rollout]] = engine.generate([prompt], spec(n=1, temperature=0.0))
    logits = hf_model.logits(prompt, rollout.token_ids)
    logits[:, list(engine.banned_token_ids)] = -torch.inf
    assert logits.argmax(-1).tolist() == rollout.token_ids.tolist()


def test_a_weight_sync_with_requests_in_flight(
    engine: VllmEngine,
    hf_model: HFModel,
    weights: Weights,
    make_prompt: MakePrompt,
) -> None:
    """Each token has the log-prob of the weights that generated it. No stale cache is reused."""
    changed = {name: tensor * 1.02 for name, tensor in weights.items()}
    prompts = [make_prompt(0), make_prompt(1)]
    long = spec(n=4, max_tokens=24)
    for number, prompt in enumerate(prompts):
        engine.submit(str(number), make_request(prompt), long.for_prompt(number))
    for _ in range(8):
        assert not engine.step()
    engine.push_weights(changed.items(), version=2)
    engine.submit("new", make_request(prompts[0]), long.for_prompt(9))  # a video that is cached
    groups: dict[str, list[Rollout]] = {}
    while engine.busy:
        groups |= engine.step()
    assert {len(group) for group in groups.values()} == {4}
    new = groups.pop("new")
    assert {(r.weight_version, r.newest_version) for r in new} == {(2, 2)}
    hf_model.load(changed)
    assert largest_gap(hf_model, engine, prompts[:1], [new]) < 1e-4
    hf_model.load(weights)
    for number, prompt in enumerate(prompts):
        for rollout in groups[str(number)]:
            assert (rollout.weight_version, rollout.newest_version) == (1, 2)
            logits = hf_model.logits(prompt, rollout.token_ids)
            logits[:, list(engine.banned_token_ids)] = -torch.inf
            old = logits.log_softmax(-1).gather(1, torch.from_numpy(rollout.token_ids)[:, None])
            gap = (old[:, 0] - torch.from_numpy(rollout.logprobs)).abs()
            assert gap[:7].max() < 1e-4 < gap[9:].max()


def test_refusals_are_one_sentence(
    engine: VllmEngine,
    weights: Weights,
    make_prompt: MakePrompt,
    checkpoint: Path,
) -> None:
    with pytest.raises(RolloutError, match=r"clip_0: \d+ prompt tokens .* fit the engine's 256"):
        engine.generate([make_prompt(0)], spec(max_tokens=250))
    prompt = make_prompt(0)
    prompt.token_ids[-1] += 1
    with pytest.raises(RolloutError, match="clip_0: vLLM read"):
        engine.generate([prompt], spec())
    prompt.token_ids[-1] -= 1
    assert len(engine.generate([prompt], spec())[0]) == 4  # vLLM did not take the video for cached
    with pytest.raises(RolloutError, match="greedy"):
        spec(n=2, temperature=0.0)
    incomplete = {name: t for name, t in weights.items() if name != "model.norm.weight"}
    with pytest.raises(RolloutError, match="left out 1 tensors"):
        engine.push_weights(incomplete.items(), version=2)
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate([make_prompt(0)], spec())
    engine.push_weights(weights.items(), version=3)  # a failed sync does not break the next one
    assert engine.weights_checksum() == tensor_checksums(weights.items(), torch.float32)
    with pytest.raises(RolloutError, match=r"/nowhere has no config\.json"):
        VllmEngine("/nowhere", config.RolloutConfig(), dtype="float32", seed=1, max_model_len=64)
    with pytest.raises(RolloutError, match=r"kv_cache_mib=1, .* KV cache is needed"):
        VllmEngine(
            str(checkpoint),
            config.RolloutConfig(kv_cache_mib=1),
            dtype="float32",
            seed=1,
            max_model_len=4096,
        )
