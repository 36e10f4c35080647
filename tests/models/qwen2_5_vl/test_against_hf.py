"""Megatron model compared with transformers: equal weights and positions, every gradient."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vrl.batching.pack import Answer, Group, MicroBatch, pack
from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.models.weight_map import chunk_rows
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.types import EncodedImage, EncodedVideo, Prompt, Visual
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN, image, present, prompt, video
from tests.tiny_models import Qwen2_5_VLForConditionalGeneration, hf_model, save


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def _model(mesh: Mesh, directory: Path) -> VisionLanguageModel:
    cfg = Model(checkpoint=str(directory), dtype="float32")
    model: VisionLanguageModel
    model = VisionLanguageModel(read_architecture(directory), cfg, Parallel(), mesh).to(mesh.device)
    load_hf_weights([model], directory)
    return model


def _groups(
    visuals: list[list[EncodedImage | EncodedVideo]], answers_per_group: list[int]
) -> list[Group]:
    """One group for each list of visuals."""
    rng = np.random.default_rng(7)
    return [
        Group(
            prompt=prompt(shown, seed),
            answers=tuple(
                Answer(
                    token_ids=rng.integers(0, 90, length),
                    advantage=1.0,
                    engine_logprobs=np.zeros(length, dtype=np.float32),
                )
                for length in answers_per_group
            ),
        )
        for seed, shown in enumerate(visuals)
    ]


def _patches(
    visuals: Sequence[Visual],
) -> torch.Tensor | None:
    patches = [patchify(visual.frames, PIXELS) for visual in visuals]
    return torch.cat(patches) if patches else None


def _forward(model: VisionLanguageModel, batch: MicroBatch, of: Distribution) -> torch.Tensor:
    patches = _patches(batch.visuals)
    logprob: torch.Tensor
    logprob = model(
        model.inputs(batch), None if patches is None else patches.to(model.mesh.device), of
    )
    return logprob


def _pixels(
    values: str, grids: str, asked: Prompt, kind: type[EncodedImage] | type[EncodedVideo]
) -> dict[str, torch.Tensor]:
    """transformers' arguments for the visuals of one kind."""
    chosen = [visual for visual in asked.visuals if isinstance(visual, kind)]
    thw = torch.tensor([visual.grid_thw for visual in chosen])
    patches = _patches(chosen)
    return {} if patches is None else {values: patches, grids: thw}


def _published_logprobs(
    model: Qwen2_5_VLForConditionalGeneration, group: Group, answer: Answer
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
        mm_token_type_ids=torch.from_numpy((ids == VIDEO_TOKEN) * 2 + (ids == IMAGE_TOKEN))[None],
        **_pixels("pixel_values_videos", "video_grid_thw", group.prompt, EncodedVideo),
        **_pixels("pixel_values", "image_grid_thw", group.prompt, EncodedImage),
    ).logits[0]
    length = len(answer.token_ids)
    logprobs = torch.log_softmax(logits[-length - 1 : -1], dim=-1)
    return logprobs.gather(1, torch.from_numpy(answer.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("visuals", "answers"),
    [
        pytest.param([[]], [3, 1], id="text"),
        pytest.param([[image((6, 10), 1)]], [4], id="image"),
        pytest.param([[video((4, 2, 2), 2.0, 1)]], [5], id="video"),
        pytest.param([[video((2, 6, 10), 0.5, 1)]], [3, 1, 7], id="odd grid"),  # cut windows
        pytest.param([[video((3, 4, 4), 1.0, 1), video((1, 8, 2), 1.5, 2)]], [4, 2], id="two"),
        pytest.param(
            [
                [image((2, 6), 1), video((2, 4, 2), 1.0, 2), image((4, 4), 3)],
                [],
                [image((2, 2), 4)],
            ],
            [2, 3],
            id="mixed",
        ),
    ],
)
def test_logprobs_and_gradients_equal_transformers(
    mesh: Mesh,
    tmp_path: Path,
    tied: bool,
    visuals: list[list[EncodedImage | EncodedVideo]],
    answers: list[int],
) -> None:
    oracle = hf_model(tied=tied)
    model = _model(mesh, save(oracle, tmp_path))
    groups = _groups(visuals, answers)
    batch = pack(groups)
    logprob, _ = _forward(model, batch, Distribution())
    expected = torch.cat([_published_logprobs(oracle, g, a) for g in groups for a in g.answers])
    torch.testing.assert_close(logprob.cpu(), expected, rtol=1e-5, atol=1e-5)

    weights = torch.linspace(-1, 1, len(expected))
    (logprob * weights.to(logprob.device)).sum().backward()
    (expected * weights).sum().backward()
    published = {
        n.replace("model.visual", "visual").replace("model.language_model", "model"): p.grad
        for n, p in oracle.named_parameters()
    }
    params = dict(model.named_parameters())
    for row in chunk_rows(model.arch, model.chunk):
        parts = [published[name] for name in row.hf_names]
        got = params[row.megatron].grad
        if any(part is None for part in parts):  # the tower, where nothing is to be seen
            assert got is None
            continue
        want = row.layout.join(present(parts))
        error = (got.cpu() - want).norm() / want.norm()
        assert error < 1e-5, f"{row.megatron}: relative error {error:.1e}"


def test_entropy_is_that_of_the_whole_distribution(mesh: Mesh, tmp_path: Path) -> None:
    oracle = hf_model()
    model = _model(mesh, save(oracle, tmp_path))
    (group,) = _groups([[video((2, 2, 2), 1.0, 1)]], [1])
    batch = pack([group])
    _, entropy = _forward(model, batch, Distribution(temperature=0.7)).cpu()
    probabilities = []
    for token in range(90):  # every word but the special ones, one answer each
        answer = Answer(
            token_ids=np.array([token]), advantage=0.0, engine_logprobs=np.zeros(1, np.float32)
        )
        single = pack([Group(prompt=group.prompt, answers=(answer,))])
        probabilities.append(_forward(model, single, Distribution(temperature=0.7))[0].cpu())
    logprobs = torch.cat(probabilities).detach()
    partial = -(logprobs.exp() * logprobs).sum()
    rest = 1 - logprobs.exp().sum()
    assert partial <= entropy[0] + 1e-5
    assert entropy[0] <= partial + rest * (np.log(6) - torch.log(rest)) + 1e-5


def test_round_trip_is_bit_equal(mesh: Mesh, tmp_path: Path) -> None:
    oracle = hf_model()
    model = _model(mesh, save(oracle, tmp_path))
    exported = dict(hf_tensors([model]))
    published = {
        n.replace("model.visual", "visual").replace("model.language_model", "model"): p
        for n, p in oracle.named_parameters()
    }
    assert exported.keys() == published.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor.cpu(), published[name]), name
