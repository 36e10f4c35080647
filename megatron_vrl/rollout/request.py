"""Rollout requests, their conversion to vLLM prompts, and a comparison of vLLM's inputs.

A `RolloutRequest` holds all data that an engine needs, so it is also the message to a rollout
worker. For every request, the prompt tokens, video grid and times that vLLM derived are compared
with the trainer's. A difference raises an error that names the sample.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.family import EngineInputs
from megatron_vrl.types import EncodedVideo, Prompt, VideoInput


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """Sampling parameters of one request."""

    n: int  # rollouts per prompt
    temperature: float  # 0: greedy, which needs n == 1
    top_p: float
    max_tokens: int
    seed: int  # seed of the first rollout; rollout i has seed + i

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise RolloutError(
                f"n={self.n} greedy rollouts would be equal: set n=1 or temperature>0."
            )
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"top_p={self.top_p} keeps no token: choose a value in (0, 1].")

    @classmethod
    def greedy(cls, max_tokens: int) -> "SamplingSpec":
        """Return the spec of one greedy answer of at most `max_tokens` tokens."""
        return cls(n=1, temperature=0.0, top_p=1.0, max_tokens=max_tokens, seed=0)

    def for_prompt(self, index: int) -> "SamplingSpec":
        """Return the spec of prompt `index`, with a seed derived from the spec's seed and `index`.

        The seed of a rollout therefore depends neither on the other prompts nor on the engine.
        """
        seed = np.random.SeedSequence([self.seed, index]).generate_state(1)[0] >> 1
        return replace(self, seed=int(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One prompt as an engine receives it."""

    id: str  # id of the sample, for error messages
    token_ids: NDArray[np.int64]  # [P] tokens of the trainer, with one pad token per vision token
    engine_token_ids: tuple[int, ...]  # tokens for vLLM, with one pad token per vision block
    videos: tuple[VideoInput, ...]


def make_request(prompt: Prompt) -> RolloutRequest:
    """Return the request of a prompt.

    Raises RolloutError for an image, which vLLM would resize by its own rules.
    """
    videos = [visual for visual in prompt.visuals if isinstance(visual, EncodedVideo)]
    if len(videos) < len(prompt.visuals):
        raise RolloutError(f"Sample {prompt.id} has an image; rollouts take videos only.")
    return RolloutRequest(
        id=prompt.id,
        token_ids=prompt.token_ids,
        engine_token_ids=prompt.engine_token_ids,
        videos=tuple(
            block
            for video, embeddings in zip(videos, prompt.visual_embeds or repeat(None), strict=False)
            for block in _blocks(video, embeddings, prompt.step_blocks)
        ),
    )


def _blocks(
    video: EncodedVideo, embeddings: NDArray[Any] | None, step_blocks: bool
) -> Iterator[VideoInput]:
    """Yield the vision blocks of a video: one, or with `step_blocks` one per temporal step."""
    steps, height, width = video.grid_thw
    parts = steps if step_blocks else 1
    frames = np.split(video.frames, parts)
    times = np.split(video.timestamps_s, parts)
    encoded = repeat(None) if embeddings is None else np.split(embeddings, parts)
    for shown, times_s, part in zip(frames, times, encoded, strict=False):
        yield VideoInput(
            frames=shown if part is None else shown[:0],
            grid_thw=(steps // parts, height, width),
            seconds_per_grid=video.seconds_per_grid,
            timestamps_s=times_s,
            embeddings=part,
        )


def max_model_len(cfg: RunConfig) -> int:
    """Return the tokens of the longest prompt and the longest response together."""
    response = max(cfg.rollout.max_response_tokens, cfg.evaluation.max_response_tokens)
    return cfg.data.max_prompt_tokens + response


def check_length(request: RolloutRequest, spec: SamplingSpec, max_model_len: int) -> None:
    """Raise RolloutError if prompt and response may not fit the engine."""
    if len(request.token_ids) + spec.max_tokens > max_model_len:
        raise RolloutError(
            f"Sample {request.id}: {len(request.token_ids)} prompt tokens and up to "
            f"{spec.max_tokens} response tokens do not fit the engine's {max_model_len}: "
            "lower data.max_prompt_tokens or rollout.max_response_tokens."
        )


def vllm_prompt(request: RolloutRequest, inputs: EngineInputs, cache_name: str) -> dict[str, Any]:
    """Return the request as a vLLM prompt. Only prompts of one `cache_name` share cache entries."""
    prompt: dict[str, Any] = {
        "prompt_token_ids": list(request.engine_token_ids),
        "multi_modal_data": {"video": _vllm_videos(request.videos, inputs)},
    }
    if cache_name:
        names = [f"{_digest(video)}-{cache_name}" for video in request.videos]
        prompt |= {"cache_salt": cache_name, "multi_modal_uuids": {"video": names}}
    return prompt


def _vllm_videos(videos: tuple[VideoInput, ...], inputs: EngineInputs) -> Any:
    if any(video.embeddings is not None for video in videos):
        return inputs.embeddings(videos)
    return [(video.frames, inputs.video_metadata(video)) for video in videos]


def _digest(video: VideoInput) -> str:
    values = video.frames if video.embeddings is None else video.embeddings
    digest = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16)
    times = video.seconds_per_grid, video.timestamps_s.tolist()
    digest.update(repr((video.grid_thw, times)).encode())
    return digest.hexdigest()


class InputCheck:
    """Comparison of the engine's input with the trainer's request.

    vLLM sends a video's values to the engine once and later only its hash. What vLLM derived for
    each hash is therefore remembered.
    """

    def __init__(self, inputs: EngineInputs) -> None:
        self._inputs = inputs
        self._sent: dict[str, tuple[Any, ...]] = {}  # hash -> grid and times

    def check(self, request: RolloutRequest, engine_input: Mapping[str, Any]) -> None:
        """Raise RolloutError naming the sample if vLLM read the prompt differently."""
        used = list(engine_input["prompt_token_ids"])
        if used != request.token_ids.tolist():
            grids = [video.grid_thw for video in request.videos]
            raise RolloutError(
                f"Sample {request.id}: vLLM read other prompt tokens ({len(used)}) than the "
                f"trainer ({len(request.token_ids)}) with video grids {grids}: check that vllm is "
                "the pinned version."
            )
        if not request.videos:
            return
        hashes = engine_input["mm_hashes"]["video"]
        items = engine_input["mm_kwargs"]["video"]
        for video, name, item in zip(request.videos, hashes, items, strict=True):
            if item is not None:
                self._sent[name] = self._inputs.derived(item)
            expected = self._inputs.expected(video)
            if self._sent[name] != expected:
                raise RolloutError(
                    f"Sample {request.id}: vLLM has grid and times {self._sent[name]} of a video, "
                    f"the trainer {expected}: check that vllm is the pinned version."
                )
