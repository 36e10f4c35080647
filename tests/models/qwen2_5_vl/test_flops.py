"""FLOP counts compared with torch's FlopCounterMode on transformers' model, and with each other."""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vrl.batching.pack import Answer, Group, pack, repeat_prompts, shard_context
from megatron_vrl.config import Model
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.flops import (
    group_flops,
    hardware_flops,
    micro_batch_flops,
    padding_rows,
    plain_tokens,
    update_flops,
)
from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.models.weight_map import num_parameters
from megatron_vrl.observe.throughput import FlopCounts
from megatron_vrl.types import EncodedVideo
from tests.running import ROOT
from tests.tiny import GROUPS, VIDEO_TOKEN, prompt, video
from tests.tiny_models import Qwen2_5_VLForConditionalGeneration, hf_model, save

ARCH = read_architecture(ROOT / "configs" / "models" / "qwen2.5-vl-3b.json")
PARTS = [field.name for field in fields(FlopCounts)]


def group(seed: int, lengths: list[int], visuals: list[EncodedVideo] | tuple[()] = ()) -> Group:
    answers = tuple(
        Answer(
            token_ids=np.arange(length),
            advantage=0.0,
            engine_logprobs=np.zeros(length, np.float32),
        )
        for length in lengths
    )
    return Group(prompt=prompt(visuals, seed), answers=answers)


def close(one: FlopCounts, other: FlopCounts) -> bool:
    return all(getattr(one, p) == pytest.approx(getattr(other, p), rel=1e-12) for p in PARTS)


def total(works: Iterable[FlopCounts]) -> FlopCounts:
    return sum(works, start=FlopCounts())


def counted(model: Qwen2_5_VLForConditionalGeneration, asked: Group) -> dict[str, dict[Any, int]]:
    """FLOPs of transformers' model on one plain sequence, by module and operation."""
    ids = torch.from_numpy(asked.prompt.token_ids)
    seen = {}
    if asked.prompt.visuals:
        patches = torch.cat([patchify(visual.frames, PIXELS) for visual in asked.prompt.visuals])
        grids = torch.tensor([visual.grid_thw for visual in asked.prompt.visuals])
        seen = {"pixel_values_videos": patches, "video_grid_thw": grids}
    # math: the kernel that is made of products, which the counter sees
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids[None],
            position_ids=torch.from_numpy(asked.prompt.positions)[:, None],
            mm_token_type_ids=(ids == VIDEO_TOKEN)[None] * 2,
            **seen,
        )
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    return counts


def spent(counts: dict[str, dict[Any, int]], suffix: str, attention: bool | None = None) -> int:
    """Return the FLOPs of modules whose name ends in `suffix`: batched products (attention) or
    others."""
    return sum(
        flops
        for module, by_operation in counts.items()
        if module.endswith(suffix)
        for operation, flops in by_operation.items()
        if attention is None or (str(operation) == "aten.bmm") == attention
    )


@pytest.mark.parametrize(
    "visuals",
    [[], [video((3, 4, 4), 1.0, 1)], [video((2, 6, 10), 1.0, 1), video((1, 8, 2), 1.5, 2)]],
    ids=["text", "video", "cut windows"],
)
def test_flops_equal_torchs_count(tmp_path: Path, visuals: list[EncodedVideo]) -> None:
    model = hf_model()
    arch = read_architecture(save(model, tmp_path))
    asked = group(1, [1], visuals)  # an answer of one token: no input of its own
    length = len(asked.prompt.token_ids)
    counts, work = counted(model, asked), group_flops(arch, asked)
    assert work.tokens == length
    layers = [f"language_model.layers.{i}" for i in range(arch.layers)]
    assert work.linear == sum(spent(counts, layer, attention=False) for layer in layers)
    square = sum(spent(counts, layer, attention=True) for layer in layers)  # not causal
    assert work.attention == square * (length + 1) / (2 * length)
    assert work.head == spent(counts, "lm_head") / length
    assert work.merger == spent(counts, "visual.merger")
    blocks = sum(spent(counts, f"visual.blocks.{i}") for i in range(arch.vision.layers))
    assert work.vision == blocks + spent(counts, "visual.patch_embed")


lengths_ = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(st.integers(0, 5), lengths_)
def test_a_group_is_its_packed_rows_in_both_layouts(seed: int, lengths: list[int]) -> None:
    asked = group(seed, lengths, [video((2, 4, 6), 1.0, 0)])
    assert close(group_flops(ARCH, asked), micro_batch_flops(ARCH, pack([asked])))
    plain = repeat_prompts([asked])
    repeated = total(group_flops(ARCH, one) for one in plain)
    assert close(repeated, micro_batch_flops(ARCH, pack(plain)))
    assert repeated.tokens == plain_tokens([asked]) == plain_tokens(plain)
    if len(lengths) == 1:
        assert repeated == group_flops(ARCH, asked)
    else:
        assert repeated.flops > group_flops(ARCH, asked).flops


@given(st.integers(0, 5), lengths_)
def test_flops_grow_with_sizes(seed: int, lengths: list[int]) -> None:
    small = group_flops(ARCH, group(seed, lengths))
    longer = group_flops(ARCH, group(seed, [lengths[0] + 1, *lengths[1:]]))
    another = group_flops(ARCH, group(seed, [*lengths, 1]))
    filmed = group_flops(ARCH, group(seed, lengths, [video((1, 2, 2), 1.0, 0)]))
    assert small.flops < min(longer.flops, another.flops, filmed.flops)


def test_padding_rows_have_no_attention_pairs() -> None:
    exact, padded = pack(GROUPS), pack(GROUPS, multiple=64)
    assert len(padded.rows) > len(exact.rows)
    one, other = micro_batch_flops(ARCH, exact), micro_batch_flops(ARCH, padded)
    assert other.tokens == len(padded.rows)
    assert other.linear / one.linear == pytest.approx(len(padded.rows) / len(exact.rows))
    assert other.attention == one.attention
    assert padding_rows(exact) == 0
    assert padding_rows(padded) == len(padded.rows) - len(exact.rows)


@pytest.mark.parametrize("ranks", [2, 4])
def test_flops_of_context_ranks_add_up(ranks: int) -> None:
    whole = pack(GROUPS, multiple=2 * ranks)
    parts = [shard_context(whole, rank, ranks) for rank in range(ranks)]
    assert close(
        total(micro_batch_flops(ARCH, part) for part in parts), micro_batch_flops(ARCH, whole)
    )
    assert sum(map(padding_rows, parts)) == padding_rows(whole)


def test_an_update_is_three_forward_passes_minus_frozen_parts() -> None:
    work = FlopCounts(tokens=1, linear=1.0, attention=10.0, head=100.0, vision=1e3, merger=1e4)
    free = Model(checkpoint="")

    def update(**frozen: bool | str) -> float:
        return update_flops(work, free.model_copy(update=frozen))

    assert update() == 3 * work.flops
    assert update(freeze_vision=True) == 3 * work.flops - 2e3 - 1e4
    assert update(freeze_vision=True, freeze_merger=True) == 3 * work.flops - 2e3 - 2e4
    assert update(freeze_language=True) == 3 * work.flops - 101
    assert update(recompute="full") == update()  # model FLOPs


def test_hardware_flops_count_what_is_computed_again() -> None:
    work = FlopCounts(tokens=1, linear=1.0, attention=10.0, head=100.0, vision=1e3, merger=1e4)

    def extra(**model: Any) -> float:
        cfg = Model(checkpoint="", **model)
        return hardware_flops(work, cfg, [3, 1]) - update_flops(work, cfg)

    assert [extra(recompute=kind) for kind in ("none", "selective", "full")] == [100, 110, 111]
    assert extra(recompute="full", recompute_num_layers=1) == 100 + 11 / 2  # 1 layer of each chunk
    assert extra(recompute="full", recompute_num_layers=9) == 111
    assert extra(recompute_vision="full") == 1100
    assert extra(recompute_vision="full", freeze_vision=True) == 100
    frozen = Model(checkpoint="", freeze_language=True)
    assert hardware_flops(work, frozen, [4]) == 3 * work.flops - 101 + 100  # logits twice


def test_the_3b_model_costs_about_two_flops_a_weight_and_token() -> None:
    """Short text has next to no attention; the head reads every answer token."""
    work = group_flops(replace(ARCH, tied_head=False), group(0, [100]))
    language = num_parameters(ARCH) - ARCH.vocab * ARCH.hidden - 668_687_360  # tower, published
    assert work.linear == pytest.approx(2 * work.tokens * language, rel=1e-3)
    assert work.head == 2 * 100 * ARCH.hidden * ARCH.vocab
