"""Work of a forward pass in FLOPs, by arithmetic: 2 for each multiply-add of a matrix product.

Counted are products with weights, attention scores and their values with exactly the pairs that
may see each other, the vision tower with its windows unless a video's tokens were kept, and logits
where a loss is. Left out, as in every such count: norms, softmax, activations, rotary angles,
look-ups, biases. Checked against torch's FlopCounterMode on transformers' model.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_vrl.batching.pack import Group, MicroBatch
from megatron_vrl.config import Model
from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.observe.throughput import Work

Grid = tuple[int, int, int]  # temporal steps; height and width in patches


def group_work(arch: Architecture, group: Group) -> Work:
    """What a group needs: its prompt and each video once, every answer's inputs, no padding."""
    return work_of_sizes(
        arch,
        len(group.prompt.token_ids),
        [len(answer.token_ids) for answer in group.answers],
        [visual.grid_thw for visual in (() if group.prompt.seen else group.prompt.visuals)],
    )


def work_of_sizes(
    arch: Architecture, prompt: int, answers: Sequence[int], grids: Sequence[Grid]
) -> Work:
    """The same of a group that is not there: tokens of prompt and answers, and its videos."""
    inputs = [length - 1 for length in answers]
    pairs = _triangle(prompt) + sum(prompt * n + _triangle(n) for n in inputs)
    language = _language(arch, prompt + sum(inputs), pairs, sum(answers))
    return vision_work(arch, grids) + language


def batch_work(arch: Architecture, batch: MicroBatch) -> Work:
    """What a micro-batch computes in its layout, padding rows too; attention by who sees whom.

    Of a context-parallel rank's part: its rows and loss tokens, and its share of the vision work,
    so that the parts add up to the whole.
    """
    sees = np.zeros(len(batch.token_ids), np.int64)  # keys that a row looks at; padding at none
    group = batch.answer_group
    starts = np.concatenate([batch.prompt_start, batch.answer_start])
    lengths = np.concatenate([batch.prompt_length, batch.answer_length])
    before = np.concatenate([np.zeros_like(batch.prompt_start), batch.prompt_length[group]])
    for start, length, prefix in zip(starts, lengths, before, strict=True):
        sees[start : start + length] = prefix + np.arange(1, length + 1)
    pairs, rows = int(sees[batch.rows].sum()), len(batch.rows)
    shown = () if batch.seen else batch.visuals
    seen = vision_work(arch, [visual.grid_thw for visual in shown])
    share = rows / len(batch.key_rows)
    return _language(arch, rows, pairs, len(batch.target)) + Work(
        vision=seen.vision * share, merger=seen.merger * share
    )


def vision_work(arch: Architecture, grids: Sequence[Grid]) -> Work:
    """The tower over videos and images."""
    v = arch.vision
    merged = v.hidden * v.merge**2
    patches = sum(t * h * w for t, h, w in grids)
    weights = v.layers * (4 * v.hidden**2 + 3 * v.hidden * v.mlp) + v.patch_values * v.hidden
    full = len(v.full_attention_layers)
    pairs = sum(
        t * (full * (h * w) ** 2 + (v.layers - full) * _window_pairs(h, w, v)) for t, h, w in grids
    )
    tokens = patches // v.merge**2
    return Work(
        vision=2.0 * patches * weights + 4.0 * v.hidden * pairs,
        merger=2.0 * tokens * merged * (merged + arch.hidden),
    )


def padding_rows(batch: MicroBatch) -> int:
    """Rows of this rank that belong to no prompt and no answer; they are the last of T."""
    used = int(batch.prompt_length.sum() + batch.answer_length.sum())
    return int((batch.rows >= used).sum())


def plain_tokens(groups: Iterable[Group]) -> int:
    """Tokens of the layout that repeats the prompt before each answer."""
    return sum(g.num_tokens + len(g.prompt.token_ids) * (len(g.answers) - 1) for g in groups)


def update_flops(work: Work, cfg: Model) -> float:
    """Model FLOPs of a training update: 3 forward passes, less in frozen parts.

    A backward pass is one product for the gradient of the input and one for that of the weight; a
    frozen part has no second, and one with nothing trained before it no first.
    """
    language = 1 + 1 + (not cfg.freeze_language)
    vision = 1 + 2 * (not cfg.freeze_vision)
    merger = 1 + (not cfg.freeze_vision) + (not cfg.freeze_merger)
    return (
        language * (work.linear + work.head)
        + 3 * work.attention
        + vision * work.vision
        + merger * work.merger
    )


def hardware_flops(work: Work, cfg: Model) -> float:
    """FLOPs that an update makes the hardware compute: recompute counts, and the head's own.

    The head computes its logits again, and the gradient of its weight even when that is frozen.
    What an attention kernel computes again inside itself is not counted.
    """
    layers = work.linear + work.attention + work.vision * (not cfg.freeze_vision)
    again = {"none": 0.0, "selective": work.attention, "full": layers}
    head = (2 if cfg.freeze_language else 1) * work.head
    return update_flops(work, cfg) + again[cfg.recompute] + head


def _language(arch: Architecture, tokens: int, pairs: int, losses: int) -> Work:
    width, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    weights = arch.hidden * (2 * width + 2 * kv + 3 * arch.mlp)  # q and o, k and v, gated MLP
    return Work(
        tokens=tokens,
        linear=2.0 * arch.layers * tokens * weights,
        attention=4.0 * arch.layers * width * pairs,
        head=2.0 * losses * arch.hidden * arch.vocab,
    )


def _triangle(length: int) -> int:
    """Pairs of causal attention."""
    return length * (length + 1) // 2


def _window_pairs(height: int, width: int, arch: VisionArchitecture) -> int:
    """Pairs inside the windows of a temporal step; the last windows of a side may be smaller."""
    side = arch.window // arch.merge // arch.patch * arch.merge  # patches per side of a window
    squares = [
        length // side * side**2 + (length % side) ** 2 for length in (height, width)
    ]  # a window's pairs are its height squared times its width squared
    return squares[0] * squares[1]
