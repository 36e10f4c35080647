"""Megatron model compared with transformers: equal weights and positions, every gradient."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vrl.batching.pack import Answer, Group, pack
from megatron_vrl.config import Parallel
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.types import EncodedImage, EncodedVideo
from tests.models.against_hf import compare, compare_export, forward, groups_of, megatron_model
from tests.tiny import image, prompt, video
from tests.tiny_models import hf_model, save


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


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
    prompts = [prompt(shown, seed) for seed, shown in enumerate(visuals)]
    compare(mesh, hf_model(tied=tied), tmp_path, groups_of(prompts, answers))


def test_entropy_is_that_of_the_whole_distribution(mesh: Mesh, tmp_path: Path) -> None:
    oracle = hf_model()
    model = megatron_model(mesh, save(oracle, tmp_path))
    (group,) = groups_of([prompt([video((2, 2, 2), 1.0, 1)], 0)], [1])
    batch = pack([group])
    _, entropy = forward(model, batch, Distribution(temperature=0.7)).cpu()
    probabilities = []
    for token in range(90):  # every word but the special ones, one answer each
        answer = Answer(
            token_ids=np.array([token]), advantage=0.0, engine_logprobs=np.zeros(1, np.float32)
        )
        single = pack([Group(prompt=group.prompt, answers=(answer,))])
        probabilities.append(forward(model, single, Distribution(temperature=0.7))[0].cpu())
    logprobs = torch.cat(probabilities).detach()
    partial = -(logprobs.exp() * logprobs).sum()
    rest = 1 - logprobs.exp().sum()
    assert partial <= entropy[0] + 1e-5
    assert entropy[0] <= partial + rest * (np.log(6) - torch.log(rest)) + 1e-5


def test_round_trip_is_bit_equal(mesh: Mesh, tmp_path: Path) -> None:
    compare_export(mesh, hf_model(), tmp_path)
