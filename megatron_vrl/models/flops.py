"""FLOPs of a forward pass, counted from sizes: 2 per multiply-add of a matrix product.

Counted: products with weights, attention scores and values for exactly the pairs that attend to
each other, the vision tower (unless its embeddings are cached), and logits of
tokens with a loss. Not counted, as is usual: norms, softmax, activations, rotary embeddings,
look-ups, biases. Tests compare the counts with torch's FlopCounterMode on transformers' model.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_vrl.batching.pack import Group, MicroBatch
from megatron_vrl.config import Model
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.matrices import head_weights, language_layer_weights
from megatron_vrl.models.recompute import fraction_in_full, vision_level
from megatron_vrl.observe.throughput import FlopCounts

Grid = tuple[int, int, int]  # temporal steps; height and width in patches


def group_flops(arch: Architecture, group: Group) -> FlopCounts:
    """Return the FLOPs that a group needs: its prompt and each video once, all answers, no
    padding."""
    return flops_of_sizes(
        arch,
        len(group.prompt.token_ids),
        [len(answer.token_ids) for answer in group.answers],
        [
            visual.grid_thw
            for visual in (() if group.prompt.visual_embeds else group.prompt.visuals)
        ],
    )


def flops_of_sizes(
    arch: Architecture, prompt: int, answers: Sequence[int], grids: Sequence[Grid]
) -> FlopCounts:
    """Return the FLOPs of a group with the given numbers of prompt and answer tokens and video
    grids."""
    inputs = [length - 1 for length in answers]
    pairs = _triangle(prompt) + sum(prompt * n + _triangle(n) for n in inputs)
    language = _language(arch, prompt + sum(inputs), pairs, sum(answers))
    return vision_flops(arch, grids) + language


def micro_batch_flops(arch: Architecture, batch: MicroBatch) -> FlopCounts:
    """Return the FLOPs that a micro-batch computes in its layout, including padding rows.

    For a context-parallel shard the count covers its rows, its loss tokens and the fraction of the
    vision FLOPs that equals its fraction of the rows. The counts of all shards add up to the whole.
    """
    num_keys = np.zeros(len(batch.token_ids), np.int64)  # keys that a row attends to; padding: 0
    group = batch.answer_group
    starts = np.concatenate([batch.prompt_start, batch.answer_start])
    lengths = np.concatenate([batch.prompt_length, batch.answer_length])
    before = np.concatenate([np.zeros_like(batch.prompt_start), batch.prompt_length[group]])
    for start, length, prefix in zip(starts, lengths, before, strict=True):
        num_keys[start : start + length] = prefix + np.arange(1, length + 1)
    pairs, rows = int(num_keys[batch.rows].sum()), len(batch.rows)
    encoded = () if batch.visual_embeds else batch.visuals
    vision = vision_flops(arch, [visual.grid_thw for visual in encoded])
    fraction = rows / len(batch.key_rows)
    return _language(arch, rows, pairs, len(batch.target)) + FlopCounts(
        vision=vision.vision * fraction, merger=vision.merger * fraction
    )


def vision_flops(arch: Architecture, grids: Sequence[Grid]) -> FlopCounts:
    """Return the FLOPs of the vision tower and merger for videos and images."""
    v, tower = arch.vision, family_of(arch).tower
    patches = sum(t * h * w for t, h, w in grids)
    pairs = sum(t * tower.attention_pairs(v, h, w) for t, h, w in grids)
    tokens = patches // v.merge**2
    return FlopCounts(
        vision=2.0 * patches * tower.tower_weights(v) + 4.0 * v.hidden * pairs,
        merger=2.0 * tokens * tower.merger_weights(arch),
    )


def padding_rows(batch: MicroBatch) -> int:
    """Return the number of this rank's rows that belong to no prompt and no answer."""
    used = int(batch.prompt_length.sum() + batch.answer_length.sum())
    return int((batch.rows >= used).sum())


def plain_tokens(groups: Iterable[Group]) -> int:
    """Return the tokens of the plain layout, which repeats the prompt before each answer."""
    return sum(g.num_tokens + len(g.prompt.token_ids) * (len(g.answers) - 1) for g in groups)


def update_flops(work: FlopCounts, cfg: Model) -> float:
    """Return the model FLOPs of a training update: 3 forward passes, fewer for frozen parts.

    A backward pass has one product for the input's gradient and one for the weight's. A frozen part
    needs no weight gradient. A frozen part with no trained part before it needs no input gradient
    either. The products of adapters are not counted.
    """
    language = 1 + 1 + cfg.trains_language
    vision = 1 + 2 * (not cfg.freeze_vision)
    merger = 1 + (not cfg.freeze_vision) + (not cfg.freeze_merger)
    return (
        language * (work.linear + work.head)
        + 3 * work.attention
        + vision * work.vision
        + merger * work.merger
    )


def hardware_flops(work: FlopCounts, cfg: Model, chunks: Sequence[int]) -> float:
    """Return the FLOPs that the hardware computes in an update, including recompute.

    `chunks` are the numbers of language layers of the chunks that compute `work`. The head computes
    its logits twice. Recompute inside an attention kernel is not counted.
    """
    again = (work.linear + work.attention) * fraction_in_full(cfg, chunks)
    again += work.attention * (cfg.recompute == "selective")
    again += work.vision * (vision_level(cfg) == "full")
    return update_flops(work, cfg) + again + work.head


def _language(arch: Architecture, tokens: int, pairs: int, losses: int) -> FlopCounts:
    """Return the FLOPs of the language model for `tokens` rows, `pairs` of attention and `losses`
    logits."""
    return FlopCounts(
        tokens=tokens,
        linear=2.0 * arch.layers * tokens * language_layer_weights(arch),
        attention=4.0 * arch.layers * (arch.heads * arch.head_dim) * pairs,
        head=2.0 * losses * head_weights(arch),
    )


def _triangle(length: int) -> int:
    """Return the number of pairs in causal attention over `length` rows."""
    return length * (length + 1) // 2
