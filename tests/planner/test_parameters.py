"""Parameter counts compared with transformers' modules, and shards compared with the whole
model."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import pytest

from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import Architecture, padded_vocab, read_architecture
from megatron_vrl.planner.parameters import ParameterCounts, add_counts, count_all, count_stage
from tests.running import ROOT
from tests.tiny_models import model_of_config

MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
ALGORITHM_PRESETS = {  # as checkpoint indices count them
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,  # as transformers builds it; no index was at hand
    "qwen3-vl-2b": 2_127_532_032,  # as transformers builds it
    "qwen3-vl-4b": 4_437_815_808,  # as transformers builds it
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,  # as transformers builds it
}


@cache
def architecture(name: str) -> Architecture:
    return read_architecture(ROOT / "configs" / "models" / f"{name}.json")


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameter_counts_equal_transformers(path: Path) -> None:
    model = model_of_config(path)
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    numbers = count_all(architecture(path.stem))
    tower, language = model.model.visual, model.model.language_model
    mergers = sum(size(part) for name, part in tower.named_children() if "merger" in name)
    assert (numbers.merger, numbers.vision) == (mergers, size(tower) - mergers)
    assert numbers.embedding == size(language.embed_tokens)
    head = 0 if architecture(path.stem).tied_head else size(model.lm_head)
    assert (numbers.head, numbers.language) == (head, size(language) + head)
    assert numbers.all == size(model) == ALGORITHM_PRESETS[path.stem]


@pytest.mark.parametrize("name", ALGORITHM_PRESETS)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual", "split"),
    [(1, 1, 1, "even"), (2, 2, 1, "even"), (2, 4, 1, "balanced"), (1, 2, 2, "balanced")],
)
def test_shards_add_up_to_the_model_and_its_copies(
    name: str, tensor: int, pipeline: int, virtual: int, split: Literal["even", "balanced"]
) -> None:
    arch = architecture(name)
    cfg = Parallel(tensor=tensor, pipeline=pipeline, virtual=virtual, split=split)
    stages = [count_stage(arch, Model(checkpoint=""), cfg, s) for s in range(pipeline)]
    whole, held = count_all(arch), add_counts(stages)
    words = padded_vocab(arch, cfg) * arch.hidden
    assert held.matrices * tensor == whole.matrices
    assert held.embedding * tensor == words
    last_has_a_copy = not arch.tied_head or pipeline > 1
    assert held.head * tensor == words * last_has_a_copy
    assert (held.vision, held.merger) == (whole.vision, whole.merger)  # on every tensor rank
    heads = arch.heads + 2 * arch.kv_heads
    biases = arch.layers * heads * arch.head_dim * arch.qkv_bias
    assert held.vectors == whole.vectors - biases + biases // tensor


def test_a_vocabulary_is_padded_for_the_ranks() -> None:
    arch = architecture("qwen2.5-vl-3b")
    cfg = Parallel(tensor=2)
    odd = Architecture(**{f: getattr(arch, f) for f in arch.__slots__} | {"vocab": 151_935})
    assert count_stage(odd, Model(checkpoint=""), cfg, 0).embedding == 151_936 // 2 * odd.hidden


def test_frozen_parts_are_not_trained() -> None:
    numbers = ParameterCounts(
        vision=1, merger=10, embedding=100, matrices=1000, vectors=10_000, head=100_000
    )
    for frozen, name in product((False, True), ("vision", "merger", "language")):
        cfg = Model.model_validate({"checkpoint": "", f"freeze_{name}": frozen})
        assert numbers.trained(cfg) == numbers.all - frozen * getattr(numbers, name)
