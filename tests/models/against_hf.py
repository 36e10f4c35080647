"""Comparison of a Megatron model with transformers' model of the same weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_vrl.batching.pack import Answer, Group, MicroBatch, pack
from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import released_name
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.models.weight_map import chunk_rows
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.types import EncodedImage, EncodedVideo, Prompt, Visual
from megatron_vrl.video.rules import PixelRules
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN, present


def megatron_model(mesh: Mesh, directory: Path) -> VisionLanguageModel:
    cfg = Model(checkpoint=str(directory), dtype="float32")
    model: VisionLanguageModel
    model = VisionLanguageModel(read_architecture(directory), cfg, Parallel(), mesh).to(mesh.device)
    load_hf_weights([model], directory)
    return model


def groups_of(prompts: Sequence[Prompt], answers_per_group: Sequence[int]) -> list[Group]:
    """A group of random answers of the given lengths for each prompt."""
    rng = np.random.default_rng(7)
    return [
        Group(
            prompt=prompt,
            answers=tuple(
                Answer(
                    token_ids=rng.integers(0, 90, length),
                    advantage=1.0,
                    engine_logprobs=np.zeros(length, dtype=np.float32),
                )
                for length in answers_per_group
            ),
        )
        for prompt in prompts
    ]


def _patches(visuals: Sequence[Visual], pixels: PixelRules) -> torch.Tensor | None:
    patches = [patchify(visual.frames, pixels) for visual in visuals]
    return torch.cat(patches) if patches else None


def forward(model: VisionLanguageModel, batch: MicroBatch, of: Distribution) -> torch.Tensor:
    patches = _patches(batch.visuals, family_of(model.arch).pixels)
    logprob: torch.Tensor
    logprob = model(
        model.inputs(batch), None if patches is None else patches.to(model.mesh.device), of
    )
    return logprob


def seen_by_transformers(asked: Prompt, pixels: PixelRules) -> dict[str, torch.Tensor]:
    """transformers' arguments for the visuals of a prompt."""
    arguments: dict[str, torch.Tensor] = {}
    kinds = {"pixel_values_videos": EncodedVideo, "pixel_values": EncodedImage}
    for values, kind in kinds.items():
        chosen = [visual for visual in asked.visuals if isinstance(visual, kind)]
        if (patches := _patches(chosen, pixels)) is not None:
            grids = "video_grid_thw" if kind is EncodedVideo else "image_grid_thw"
            arguments |= {values: patches}
            arguments |= {grids: torch.tensor([visual.grid_thw for visual in chosen])}
    return arguments


def token_types(ids: np.ndarray) -> torch.Tensor:
    """transformers' modality [1, P] of each token."""
    return torch.from_numpy((ids == VIDEO_TOKEN) * 2 + (ids == IMAGE_TOKEN))[None]


def published_logprobs(
    model: PreTrainedModel, group: Group, answer: Answer, pixels: PixelRules
) -> torch.Tensor:
    """Log-probs [R] of one answer by transformers, prompt and answer as one plain sequence."""
    ids = np.concatenate([group.prompt.token_ids, answer.token_ids])
    first = int(group.prompt.positions.max()) + 1
    tail = np.broadcast_to(
        np.arange(first, first + len(answer.token_ids)), (3, len(answer.token_ids))
    )
    positions = np.concatenate([group.prompt.positions, tail], axis=1)
    logits = model(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[:, None],
        mm_token_type_ids=token_types(ids),
        **seen_by_transformers(group.prompt, pixels),
    ).logits[0]
    length = len(answer.token_ids)
    logprobs = torch.log_softmax(logits[-length - 1 : -1], dim=-1)
    return logprobs.gather(1, torch.from_numpy(answer.token_ids)[:, None])[:, 0]


def compare(mesh: Mesh, oracle: PreTrainedModel, directory: Path, groups: list[Group]) -> None:
    """Log-probs of all answers and every gradient are transformers', within 1e-5."""
    oracle.save_pretrained(directory)
    model = megatron_model(mesh, directory)
    family = family_of(model.arch)
    logprob, _ = forward(model, pack(groups), Distribution())
    pairs = [(group, answer) for group in groups for answer in group.answers]
    expected = torch.cat([published_logprobs(oracle, *pair, family.pixels) for pair in pairs])
    torch.testing.assert_close(logprob.cpu(), expected, rtol=1e-5, atol=1e-5)

    weights = torch.linspace(-1, 1, len(expected))
    (logprob * weights.to(logprob.device)).sum().backward()
    (expected * weights).sum().backward()
    named = oracle.named_parameters()
    published = {released_name(family.weights, name): param.grad for name, param in named}
    params = dict(model.named_parameters())
    for row in chunk_rows(model.arch, model.chunk):
        parts = [published[name] for name in row.hf_names]
        got = params[row.megatron].grad
        if any(part is None for part in parts):  # the tower, where nothing is to be seen
            assert got is None
            continue
        want = row.layout.join(present(parts))
        assert got is not None
        error = (got.cpu() - want).norm() / want.norm()
        assert error < 1e-5, f"{row.megatron}: relative error {error:.1e}"


def compare_export(mesh: Mesh, oracle: PreTrainedModel, directory: Path) -> None:
    """The weights come back to the bit, under the names of the released checkpoint."""
    oracle.save_pretrained(directory)
    model = megatron_model(mesh, directory)
    exported = dict(hf_tensors([model]))
    named = oracle.named_parameters()
    published = {released_name(family_of(model.arch).weights, name): param for name, param in named}
    assert exported.keys() == published.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor.cpu(), published[name]), name
