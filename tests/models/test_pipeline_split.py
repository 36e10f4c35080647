"""Split of layers over pipeline stages."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.chunk import whole_model
from megatron_vrl.models.pipeline_split import (
    all_chunks,
    balanced_counts,
    check_divides,
    extra_layers,
    layer_counts,
    stage_chunks,
)

MODELS = Path(__file__).parents[2] / "configs" / "models"
MODEL = Model(checkpoint="")


def heaviest(counts: list[int] | tuple[int, ...], extra: tuple[float, float]) -> float:
    weights = [float(count) for count in counts]
    weights[0] += extra[0]
    weights[-1] += extra[1]
    return max(weights)


@pytest.mark.parametrize("extra", [(0.0, 0.0), (2.4, 0.7), (0.3, 3.1), (20.0, 1.0)])
@pytest.mark.parametrize(("layers", "chunks"), [(4, 2), (9, 3), (8, 4)])
def test_no_split_has_a_lighter_heaviest_stage(
    layers: int, chunks: int, extra: tuple[float, float]
) -> None:
    counts = balanced_counts(layers, extra, chunks)
    assert sum(counts) == layers and min(counts) >= 1
    every_cut = product(range(1, layers + 1), repeat=chunks)
    best = min(heaviest(cut, extra) for cut in every_cut if sum(cut) == layers)
    assert heaviest(counts, extra) == pytest.approx(best)


@pytest.mark.parametrize("name", ["3b", "7b", "32b", "72b"])
@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (4, 2)])
def test_chunks_cover_every_published_model_once(name: str, layout: tuple[int, int]) -> None:
    arch = read_architecture(MODELS / f"qwen2.5-vl-{name}.json")
    pipeline, virtual = layout
    cfg = Parallel(pipeline=pipeline, virtual=virtual, split="balanced")
    chunks = all_chunks(arch, MODEL, cfg)
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(arch.layers))
    assert [chunk.pre_process for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.post_process for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for stage in range(pipeline):
        assert stage_chunks(arch, MODEL, cfg, stage) == chunks[stage::pipeline]
    assert len(chunks[0].layers) < len(chunks[1].layers)  # the tower is beside the first


def test_the_tower_weighs_its_multiply_adds() -> None:
    """3B by hand: 32 blocks of 4 * 1280^2 + 3 * 1280 * 3420 for each of 4 patches of a token."""
    arch = read_architecture(MODELS / "qwen2.5-vl-3b.json")
    layer = 2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 11008
    tower = 4 * (32 * (4 * 1280**2 + 3 * 1280 * 3420) + 1176 * 1280) + 5120 * (5120 + 2048)
    vision, head = extra_layers(arch, MODEL)
    assert vision == pytest.approx(0.75 * tower / layer)
    assert head == pytest.approx(0.25 * 151936 * 2048 / layer)
    frozen = Model(checkpoint="", freeze_vision=True, freeze_merger=True)
    assert extra_layers(arch, frozen)[0] == pytest.approx(vision / 3)


def test_given_counts_are_taken_as_they_are() -> None:
    arch = read_architecture(MODELS / "qwen2.5-vl-3b.json")
    counts = [3, 11, 11, 11]
    cfg = Parallel(pipeline=2, virtual=2, layers_per_chunk=counts)
    assert layer_counts(arch, MODEL, cfg) == counts
    assert all_chunks(arch, MODEL, Parallel()) == [whole_model(arch)]


def test_fp8_blocks_must_divide_what_sequence_parallelism_gathers() -> None:
    arch = read_architecture(MODELS / "qwen2.5-vl-7b.json")
    cfg = Model(checkpoint="", layers="transformer_engine", fp8="blockwise")
    tensor2 = Parallel(tensor=2, sequence=True)
    check_divides(arch, cfg, tensor2)
    narrow = replace(arch, hidden=arch.hidden + 64)
    check_divides(narrow, cfg, Parallel(tensor=2))
    with pytest.raises(ConfigError, match=r"blocks of 128 .* 3648 hidden channels: set"):
        check_divides(narrow, cfg, tensor2)
