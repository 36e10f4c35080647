"""Qwen3-VL on Megatron compared with transformers: equal weights, every gradient, positions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vrl.config import Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.qwen3_vl.pixels import PIXELS
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.types import EncodedImage, EncodedVideo
from tests.models.against_hf import (
    compare,
    compare_export,
    groups_of,
    seen_by_transformers,
    token_types,
)
from tests.tiny_models import qwen3_model, save
from tests.tiny_qwen3_vl import ARCH, image, prompt, video

TEXT: list[EncodedImage | EncodedVideo] = []
CASES: dict[str, tuple[list[list[EncodedImage | EncodedVideo]], list[int]]] = {
    "text": ([TEXT], [3, 1]),
    "image": ([[image((6, 10), 1)]], [4]),
    "video": ([[video((4, 2, 2), 2.0, 1)]], [5]),
    "odd grid": ([[video((2, 6, 10), 0.5, 1)]], [3, 1, 7]),
    "two videos": ([[video((3, 4, 4), 1.0, 1), video((1, 8, 2), 1.5, 2)]], [4, 2]),
    "mixed": (
        [
            [image((2, 6), 1), video((2, 4, 2), 1.0, 2), image((4, 4), 3)],
            TEXT,
            [image((2, 2), 4)],
        ],
        [2, 3],
    ),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_logprobs_and_gradients_equal_transformers(
    mesh: Mesh, tmp_path: Path, tied: bool, name: str
) -> None:
    visuals, answers = CASES[name]
    prompts = [prompt(shown, seed) for seed, shown in enumerate(visuals)]
    compare(mesh, qwen3_model(tied=tied), tmp_path, groups_of(prompts, answers))


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal(mesh: Mesh, tmp_path: Path, tied: bool) -> None:
    compare_export(mesh, qwen3_model(tied=tied), tmp_path)


def test_the_tiny_architecture_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    assert read_architecture(save(qwen3_model(), tmp_path)) == ARCH


@pytest.mark.parametrize("name", CASES)
def test_positions_equal_transformers(name: str) -> None:
    model = qwen3_model().model
    for seed, shown in enumerate(CASES[name][0]):
        asked = prompt(shown, seed)
        seen = seen_by_transformers(asked, PIXELS)
        grids = {key: value for key, value in seen.items() if key.endswith("thw")}
        ids = torch.from_numpy(asked.token_ids)[None]
        wanted, _ = model.get_rope_index(ids, token_types(asked.token_ids), **grids)
        assert torch.equal(torch.from_numpy(asked.positions), wanted[:, 0])
