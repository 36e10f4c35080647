"""Rollout requests, their conversion to vLLM prompts, and a comparison of vLLM's inputs.

A `RolloutRequest` holds all data that an engine needs, so it is also the message to a rollout
worker. For every request, the prompt tokens, grids and times that vLLM derived are compared with
the trainer's. A difference raises an error that names the sample.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.family import EngineInputs
from megatron_vrl.parallel.arrays import as_tensor
from megatron_vrl.types import EncodedImage, EncodedVideo, Prompt, VisualInput

Kind = Literal["video", "image"]
KINDS: dict[Kind, str] = {"video": "a video", "image": "an image"}  # in messages


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
    visuals: tuple[VisualInput, ...]  # blocks of videos and images, in the order of their tokens

    def of_kind(self, kind: Kind) -> list[VisualInput]:
        """Return the blocks of one modality, in order."""
        return [visual for visual in self.visuals if visual.kind == kind]


def make_request(prompt: Prompt) -> RolloutRequest:
    """Return the request of a prompt."""
    blocks: list[VisualInput] = []
    for visual, embeddings in zip(
        prompt.visuals, prompt.visual_embeds or repeat(None), strict=False
    ):
        if isinstance(visual, EncodedVideo):
            blocks += _blocks(visual, embeddings, prompt.step_blocks)
        else:
            blocks.append(_image(visual, embeddings))
    return RolloutRequest(
        id=prompt.id,
        token_ids=prompt.token_ids,
        engine_token_ids=prompt.engine_token_ids,
        visuals=tuple(blocks),
    )


def _image(image: EncodedImage, embeddings: NDArray[Any] | None) -> VisualInput:
    """Return the vision block of an image, with one of its two equal frames."""
    return VisualInput(
        kind="image",
        frames=image.frames[: 1 if embeddings is None else 0],
        grid_thw=image.grid_thw,
        seconds_per_grid=0.0,
        timestamps_s=np.zeros(0),
        embeddings=embeddings,
    )


def _blocks(
    video: EncodedVideo, embeddings: NDArray[Any] | None, step_blocks: bool
) -> Iterator[VisualInput]:
    """Yield the vision blocks of a video: one, or with `step_blocks` one per temporal step."""
    steps, height, width = video.grid_thw
    parts = steps if step_blocks else 1
    frames = np.split(video.frames, parts)
    times = np.split(video.timestamps_s, parts)
    encoded = repeat(None) if embeddings is None else np.split(embeddings, parts)
    for shown, times_s, part in zip(frames, times, encoded, strict=False):
        yield VisualInput(
            kind="video",
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
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.engine_token_ids)}
    shown = {kind: blocks for kind in KINDS if (blocks := request.of_kind(kind))}
    if shown:
        data = {"video": _vllm_videos, "image": _vllm_images}
        prompt["multi_modal_data"] = {kind: data[kind](of, inputs) for kind, of in shown.items()}
    if cache_name:
        prompt["cache_salt"] = cache_name
        prompt["multi_modal_uuids"] = {
            kind: [f"{_digest(block)}-{cache_name}" for block in blocks]
            for kind, blocks in shown.items()
        }
    return prompt


def _vllm_videos(videos: Sequence[VisualInput], inputs: EngineInputs) -> Any:
    if videos[0].embeddings is not None:
        return inputs.embeddings(videos)
    return [(video.frames, inputs.video_metadata(video)) for video in videos]


def _vllm_images(images: Sequence[VisualInput], _: EngineInputs) -> Any:
    """Return the pictures, which vLLM's processor must not resize, or embeddings and grids."""
    if images[0].embeddings is None:
        return [image.frames[0] for image in images]
    embeddings = [as_tensor(image.embeddings) for image in images if image.embeddings is not None]
    return {
        "image_embeds": torch.cat(embeddings),
        "image_grid_thw": torch.tensor([image.grid_thw for image in images]),
    }


def _digest(visual: VisualInput) -> str:
    values = visual.frames if visual.embeddings is None else visual.embeddings
    digest = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16)
    times = visual.seconds_per_grid, visual.timestamps_s.tolist()
    digest.update(repr((visual.grid_thw, times)).encode())
    return digest.hexdigest()


class InputCheck:
    """Comparison of the engine's input with the trainer's request.

    vLLM sends the values of a video or an image to the engine once and later only their hash. What
    vLLM derived for each hash is therefore remembered.
    """

    def __init__(self, inputs: EngineInputs) -> None:
        self._inputs = inputs
        self._sent: dict[str, tuple[Any, ...]] = {}  # hash -> grid and times

    def check(self, request: RolloutRequest, engine_input: Mapping[str, Any]) -> None:
        """Raise RolloutError naming the sample if vLLM read the prompt differently."""
        used = list(engine_input["prompt_token_ids"])
        if used != request.token_ids.tolist():
            grids = [visual.grid_thw for visual in request.visuals]
            raise RolloutError(
                f"Sample {request.id}: vLLM read other prompt tokens ({len(used)}) than the "
                f"trainer ({len(request.token_ids)}) with the grids {grids}: check that vllm is "
                "the pinned version."
            )
        for kind in KINDS:
            if blocks := request.of_kind(kind):
                names, items = engine_input["mm_hashes"][kind], engine_input["mm_kwargs"][kind]
                for block, name, item in zip(blocks, names, items, strict=True):
                    self._check_block(request.id, block, name, item)

    def _check_block(
        self, sample: str, block: VisualInput, name: str, item: Mapping[str, Any] | None
    ) -> None:
        """Compare a block with vLLM's `item` of it; None: vLLM has sent the item before."""
        is_video = block.kind == "video"
        if item is not None:
            self._sent[name] = self._inputs.derived(item) if is_video else _image_grid(item)
        expected = self._inputs.expected(block) if is_video else (block.grid_thw,)
        if (derived := self._sent[name]) != expected:
            raise RolloutError(
                f"Sample {sample}: vLLM has grid and times {derived} of {KINDS[block.kind]}, the "
                f"trainer {expected}: check that vllm is the pinned version."
            )


def _image_grid(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the grid that vLLM derived for an image."""
    return (tuple(item["image_grid_thw"].data.tolist()),)
