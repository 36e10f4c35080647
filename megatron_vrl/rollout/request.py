"""What is asked of an engine, how vLLM wants it said, and the check that it read the same.

A request holds what travels to a rollout worker and no more. Prompt tokens, grid and seconds per
grid step that the engine derived are compared with the trainer's for every request: a prompt that
the two sides place differently is an error that names the sample.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.errors import RolloutError
from megatron_vrl.parallel.arrays import as_tensor
from megatron_vrl.types import EncodedVideo, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    n: int  # answers per prompt
    temperature: float  # 0 is greedy, and asks for n == 1
    top_p: float
    max_tokens: int
    seed: int  # give every rank and every step its own

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise RolloutError(
                f"n={self.n} greedy answers would be equal; set n=1 or temperature>0."
            )
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"top_p={self.top_p} keeps no token; choose a value in (0, 1].")

    @classmethod
    def greedy(cls, max_tokens: int) -> "SamplingSpec":
        """Return the spec of one greedy answer of at most `max_tokens` tokens."""
        return cls(n=1, temperature=0.0, top_p=1.0, max_tokens=max_tokens, seed=0)

    def of_prompt(self, index: int) -> "SamplingSpec":
        """For one of several prompts. Each draws from a seed of its own, so an answer does not
        depend on what is generated beside it, nor on which engine does it."""
        seed = np.random.SeedSequence([self.seed, index]).generate_state(1)[0] >> 1
        return replace(self, seed=int(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInput:
    frames: NDArray[np.uint8]  # [F, height, width, 3] RGB, resized; F is 0 beside tokens
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float
    tokens: NDArray[Any] | None = None  # [tokens, hidden] as the trainer's tower made them


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    id: str  # of its sample, for messages
    token_ids: NDArray[np.int64]  # [P] as the trainer has them
    engine_token_ids: tuple[int, ...]  # with one single pad per video
    videos: tuple[VideoInput, ...]


def request_of(prompt: Prompt) -> Request:
    """Raises RolloutError for a still picture: vLLM would encode it by rules of its own."""
    videos = [visual for visual in prompt.visuals if isinstance(visual, EncodedVideo)]
    if len(videos) < len(prompt.visuals):
        raise RolloutError(f"Sample {prompt.id} has an image; rollouts take videos only.")
    return Request(
        id=prompt.id,
        token_ids=prompt.token_ids,
        engine_token_ids=prompt.engine_token_ids,
        videos=tuple(
            VideoInput(
                frames=video.frames if tokens is None else video.frames[:0],
                grid_thw=video.grid_thw,
                seconds_per_grid=video.seconds_per_grid,
                tokens=tokens,
            )
            for video, tokens in zip(videos, prompt.seen or repeat(None), strict=False)
        ),
    )


def check_length(request: Request, spec: SamplingSpec, max_model_len: int) -> None:
    """Raises RolloutError if prompt and answer may not fit the engine."""
    if len(request.token_ids) + spec.max_tokens > max_model_len:
        raise RolloutError(
            f"Sample {request.id}: {len(request.token_ids)} prompt tokens and up to "
            f"{spec.max_tokens} answer tokens do not fit the engine's {max_model_len}; "
            "lower data.max_prompt_tokens or rollout.max_response_tokens."
        )


def vllm_prompt(request: Request, cache_name: str) -> dict[str, Any]:
    """What vLLM computes is shared by prompts of one `cache_name` only."""
    prompt: dict[str, Any] = {
        "prompt_token_ids": list(request.engine_token_ids),
        "multi_modal_data": {"video": _vllm_videos(request.videos)},
    }
    if cache_name:
        names = [f"{_digest(video)}-{cache_name}" for video in request.videos]
        prompt |= {"cache_salt": cache_name, "multi_modal_uuids": {"video": names}}
    return prompt


def _vllm_videos(videos: tuple[VideoInput, ...]) -> Any:
    tokens = [as_tensor(video.tokens) for video in videos if video.tokens is not None]
    if not tokens:
        return [(video.frames, _metadata(video)) for video in videos]
    return {
        "video_embeds": torch.cat(tokens),
        "video_grid_thw": torch.tensor([video.grid_thw for video in videos]),
        "second_per_grid_ts": torch.tensor([video.seconds_per_grid for video in videos]),
    }


def _digest(video: VideoInput) -> str:
    shown = video.frames if video.tokens is None else video.tokens
    digest = hashlib.blake2b(np.ascontiguousarray(shown).data, digest_size=16)
    digest.update(repr((video.grid_thw, video.seconds_per_grid)).encode())
    return digest.hexdigest()


def _metadata(video: VideoInput) -> dict[str, Any]:
    """Metadata under which the processor takes all frames as they are.

    It derives the seconds per grid step as 2 / fps, so fps is stated from that side, and keeps it
    in 32 bits: positions agree with a trainer that uses float(np.float32(seconds_per_grid)).
    """
    num_frames = len(video.frames)
    fps = 2.0 / video.seconds_per_grid
    return {
        "total_num_frames": num_frames,
        "fps": fps,
        "duration": num_frames / fps,
        "frames_indices": list(range(num_frames)),
        "video_backend": "megatron_vrl",
        "do_sample_frames": False,
    }


class InputCheck:
    """Compares what vLLM made of a prompt with what the trainer has.

    vLLM sends a video's values into the engine once and later only its hash, so what was sent
    under a hash is remembered.
    """

    def __init__(self) -> None:
        self._sent: dict[str, tuple[tuple[int, ...], float]] = {}  # hash -> grid, seconds per grid

    def check(self, request: Request, engine_input: Mapping[str, Any]) -> None:
        """Raises RolloutError naming the sample."""
        used = list(engine_input["prompt_token_ids"])
        if used != request.token_ids.tolist():
            grids = [video.grid_thw for video in request.videos]
            raise RolloutError(
                f"Sample {request.id}: vLLM read {len(used)} prompt tokens, the trainer "
                f"{len(request.token_ids)}, or others; the grids are {grids}."
            )
        if not request.videos:
            return
        hashes = engine_input["mm_hashes"]["video"]
        items = engine_input["mm_kwargs"]["video"]
        for video, name, item in zip(request.videos, hashes, items, strict=True):
            if item is not None:
                grid = tuple(item["video_grid_thw"].data.tolist())
                self._sent[name] = grid, float(item["second_per_grid_ts"].data)
            wanted = video.grid_thw, float(torch.tensor(video.seconds_per_grid))  # in 32 bits
            if self._sent[name] != wanted:
                raise RolloutError(
                    f"Sample {request.id}: vLLM placed a video with grid and seconds per step "
                    f"{self._sent[name]}, the trainer with {wanted}."
                )
