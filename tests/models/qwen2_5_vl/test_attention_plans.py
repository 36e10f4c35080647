"""Attention plans compared with a dense mask, on one rank and on context-parallel ranks."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vrl.batching.pack import Answer, Group, MicroBatch, pack, shard_context
from megatron_vrl.config import load_config
from megatron_vrl.models import cascade_calls
from megatron_vrl.models.attention import PlannedAttention, VarlenAttention
from megatron_vrl.models.attention_plans import language_plan, varlen_plan
from megatron_vrl.models.cascade_attention import CascadeAttention
from megatron_vrl.models.cascade_plans import varlen_cascade, view_cascade
from megatron_vrl.models.precision import attention_backend
from tests.running import ROOT
from tests.tiny import prompt
from tests.varlen import backward_by_definition, forward_by_definition, kernel_by_definition

CPU = torch.device("cpu")
HEADS, KV_HEADS, CHANNELS = 4, 2, 8


def group(seed: int, lengths: list[int]) -> Group:
    answers = tuple(
        Answer(
            token_ids=np.full(length, seed),
            advantage=float(length),
            engine_logprobs=np.arange(length, dtype=np.float32),
        )
        for length in lengths
    )
    return Group(prompt=prompt([], seed), answers=answers)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_gpu_in_bfloat16_reads_a_prompts_keys_where_they_lie(config: Path) -> None:
    """Every shipped config. Transformer Engine's attention would copy them for each answer."""
    model = load_config(config).model.model_copy(update={"dtype": "bfloat16"})
    assert attention_backend(model, torch.device("cuda")) == "flash"


batches = st.lists(
    st.builds(group, st.integers(0, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
    min_size=1,
    max_size=3,
)


def visible(batch: MicroBatch) -> np.ndarray:
    """[T, T] who may look at whom, cell by cell; rows of padding see themselves."""
    mask = np.eye(len(batch.token_ids), dtype=bool)
    for start, length in zip(batch.prompt_start, batch.prompt_length, strict=True):
        rows = slice(start, start + length)
        mask[rows, rows] = np.tri(length)
    for start, length, of in zip(
        batch.answer_start, batch.answer_length, batch.answer_group, strict=True
    ):
        rows = slice(start, start + length)
        first = batch.prompt_start[of]
        mask[rows, first : first + batch.prompt_length[of]] = True
        mask[rows, rows] = np.tri(length)
    return mask


def attend(
    core: Callable[..., Any],
    plan_of: Callable[[MicroBatch, torch.device], object],
    batch: MicroBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """The plan's output for the rows of `batch`, keys in the order in which ranks gather them."""
    grouped = query.view(len(query), KV_HEADS, -1, CHANNELS)
    mixed = torch.cat([grouped, key[:, :, None], value[:, :, None]], dim=2)
    layer = core(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), 1)
    whole = len(batch.rows) == len(batch.key_rows)
    elsewhere = None if whole else mixed[batch.key_rows][:, :, -2:]
    output: torch.Tensor = layer.attend(mixed[batch.rows], elsewhere, plan_of(batch, CPU))
    return output[:, 0]


@pytest.fixture(scope="module", autouse=True)
def variable_length_kernel() -> Iterator[None]:
    """FlashAttention of a GPU by its definition."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade_calls, "flash_forward", forward_by_definition)
        patch.setattr(cascade_calls, "flash_backward", backward_by_definition)
        yield


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "core, plan_of",
    [
        (PlannedAttention, language_plan),
        (partial(VarlenAttention, kernel=kernel_by_definition), varlen_plan),
        (CascadeAttention, partial(view_cascade, key_heads=KV_HEADS)),
        (CascadeAttention, varlen_cascade),
    ],
)
@given(groups=batches)
def test_attention_equals_a_dense_mask(
    ranks: int,
    core: Callable[..., Any],
    plan_of: Callable[[MicroBatch, torch.device], object],
    groups: list[Group],
) -> None:
    """Outputs, and the gradients that all context ranks together give, in float64."""
    batch = pack(groups, multiple=2 * ranks)
    total = len(batch.token_ids)
    noise = torch.Generator().manual_seed(total)
    draw = partial(torch.randn, total, generator=noise, dtype=torch.float64)
    given = [draw(heads, CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = leaves = [x.clone().requires_grad_() for x in given]
    wide_key, wide_value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, wide_key) / CHANNELS**0.5
    scores = scores.masked_fill(~torch.from_numpy(visible(batch)), -torch.inf)
    wanted = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide_value).flatten(1)
    used = sum(g.num_tokens for g in groups)  # what padding attends to does not matter
    slope = draw(HEADS * CHANNELS) * (torch.arange(total) < used)[:, None]
    wanted.backward(slope)
    ours = [x.clone().requires_grad_() for x in given]
    for rank in range(ranks):
        part = shard_context(batch, rank, ranks)
        real = torch.from_numpy(part.rows < used)
        got = attend(core, plan_of, part, *ours)
        torch.testing.assert_close(got[real], wanted[part.rows][real])
        got.backward(slope[part.rows])
    for mine, theirs in zip(ours, leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@given(groups=batches, ranks=st.sampled_from([2, 4]))
def test_context_ranks_partition_rows_and_loss_tokens(groups: list[Group], ranks: int) -> None:
    batch = pack(groups, multiple=2 * ranks)
    parts = [shard_context(batch, rank, ranks) for rank in range(ranks)]
    rows = np.concatenate([part.rows for part in parts])
    assert sorted(rows) == list(range(len(batch.token_ids)))
    assert all((part.key_rows == rows).all() for part in parts)
    assert len({len(part.rows) for part in parts}) == 1
    whole = sorted(
        zip(batch.source, batch.target, batch.sequence, batch.engine_logprob, strict=True)
    )
    shared = sorted(
        item
        for part in parts
        for item in zip(
            part.rows[part.source], part.target, part.sequence, part.engine_logprob, strict=True
        )
    )
    assert shared == whole
