"""Packing of groups into micro-batches; each prompt is computed once.

Layout of a micro-batch: `[prompt | answer 1 | ... | answer n]` for one group after the other. An
answer attends to its prompt and to itself, and its positions continue the prompt's. The last token
of an answer predicts nothing, so it is a target and not an input. The prompt's last token predicts
the first token of every answer. The plain layout repeats the prompt before each answer; it is the
reference that the shared layout must equal.

Example: a prompt of 3 tokens with answers of 4 and 2 tokens packs to T = 3 + 3 + 1 = 7 input tokens
and N = 4 + 2 = 6 loss tokens.

Shape letters: T packed tokens, L packed tokens of this rank, N loss tokens, G groups, A answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.types import Prompt, Visual


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to train on."""

    token_ids: NDArray[np.int64]  # [R]
    advantage: float
    engine_logprobs: NDArray[np.float32]  # [R] of the engine; NaN: no engine sampled the answer
    id: str = ""  # for error messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt with the answers that are trained on it."""

    prompt: Prompt
    answers: tuple[Answer, ...]

    @property
    def num_tokens(self) -> int:
        """Return the number of input tokens of the group in the shared layout."""
        return len(self.prompt.token_ids) + sum(len(a.token_ids) - 1 for a in self.answers)

    @property
    def num_targets(self) -> int:
        """Return the number of loss tokens of the group."""
        return sum(len(a.token_ids) for a in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Input of one forward and backward pass, as host arrays; the policy moves them to the
    device."""

    token_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [3, T]
    prompt_start: NDArray[np.int64]  # [G] index in T
    prompt_length: NDArray[np.int64]  # [G]
    answer_start: NDArray[np.int64]  # [A] index in T
    answer_length: NDArray[np.int64]  # [A] input tokens, R - 1
    answer_group: NDArray[np.int64]  # [A] index in G
    answer_id: tuple[str, ...]  # [A] for error messages
    visuals: tuple[Visual, ...]  # in the order of their vision pad tokens in T
    visual_embeds: tuple[NDArray[Any], ...]  # their cached vision embeddings; () if there are none
    source: NDArray[np.int64]  # [N] index in `rows` of the token that predicts the target
    target: NDArray[np.int64]  # [N] token id
    advantage: NDArray[np.float32]  # [N]
    engine_logprob: NDArray[np.float32]  # [N]
    sequence: NDArray[np.int64]  # [N] index of the answer in A
    weight: NDArray[np.float32]  # [N] weight of the token's loss in the step's loss
    rows: NDArray[np.int64]  # [L] index in T of this context-parallel rank's rows
    key_rows: NDArray[np.int64]  # [T] `rows` of all context-parallel ranks, concatenated


def pack(
    groups: Sequence[Group], *, multiple: int = 1, at_least: int = 0, pad_token: int = 0
) -> MicroBatch:
    """Return a micro-batch of whole groups, in which every loss token has weight 1.

    T is padded to at least `at_least` rows and to a multiple of `multiple`.
    """
    pieces = [piece for group in groups for piece in _pieces(group)]  # per group: prompt, answers
    is_prompt = np.array([k == 0 for group in groups for k in range(1 + len(group.answers))])
    lengths = np.array([len(token_ids) for token_ids, _ in pieces])
    starts = np.cumsum(lengths) - lengths
    answer_group = np.repeat(np.arange(len(groups)), [len(group.answers) for group in groups])
    predicts_first = (starts + lengths - 1)[is_prompt][answer_group]  # the prompt's last token
    inputs = zip(predicts_first, starts[~is_prompt], lengths[~is_prompt], strict=True)
    answers = [answer for group in groups for answer in group.answers]
    targets = [len(answer.token_ids) for answer in answers]
    rows = np.arange(-(-max(int(lengths.sum()), at_least) // multiple) * multiple)
    padding = len(rows) - int(lengths.sum())
    return MicroBatch(
        token_ids=np.concatenate([*(ids for ids, _ in pieces), np.full(padding, pad_token)]),
        positions=np.concatenate([*(p for _, p in pieces), np.zeros((3, padding), np.int64)], 1),
        prompt_start=starts[is_prompt],
        prompt_length=lengths[is_prompt],
        answer_start=starts[~is_prompt],
        answer_length=lengths[~is_prompt],
        answer_group=answer_group,
        answer_id=tuple(answer.id for answer in answers),
        visuals=tuple(visual for group in groups for visual in group.prompt.visuals),
        visual_embeds=tuple(tokens for group in groups for tokens in group.prompt.visual_embeds),
        source=np.concatenate([[first, *range(start, start + n)] for first, start, n in inputs]),
        target=np.concatenate([answer.token_ids for answer in answers]),
        advantage=np.repeat([a.advantage for a in answers], targets).astype(np.float32),
        engine_logprob=np.concatenate([a.engine_logprobs for a in answers]).astype(np.float32),
        sequence=np.repeat(np.arange(len(answers)), targets),
        weight=np.ones(sum(targets), dtype=np.float32),
        rows=rows,
        key_rows=rows,
    )


def _pieces(group: Group) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield token ids and positions [3, length] of the prompt, then of each answer's inputs."""
    yield group.prompt.token_ids, group.prompt.positions
    next_position = int(group.prompt.positions.max()) + 1
    for answer in group.answers:
        inputs = answer.token_ids[:-1]
        steps = np.arange(next_position, next_position + len(inputs))
        yield inputs, np.broadcast_to(steps, (3, len(inputs)))


def shard_context(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """Return the shard of context-parallel rank `rank`: its rows of T and the loss tokens they
    predict.

    T, a multiple of 2 * size, is cut into 2 * size pieces. A rank takes one piece from each end, so
    that all ranks have equal causal attention work (Llama 3, arXiv 2407.21783). Example with size
    2: rank 0 takes pieces 0 and 3, rank 1 takes pieces 1 and 2.

    `source` becomes an index in the shard's rows. Prompts, answers and visuals stay whole and keep
    their indices in T.
    """
    if size == 1:
        return batch
    pieces = np.split(batch.rows, 2 * size)
    shards = [np.concatenate([pieces[r], pieces[2 * size - 1 - r]]) for r in range(size)]
    index = np.full(len(batch.rows), -1)
    index[shards[rank]] = np.arange(len(shards[rank]))
    own = index[batch.source] >= 0
    return replace(
        batch,
        rows=shards[rank],
        key_rows=np.concatenate(shards),
        source=index[batch.source[own]],
        target=batch.target[own],
        advantage=batch.advantage[own],
        engine_logprob=batch.engine_logprob[own],
        sequence=batch.sequence[own],
        weight=batch.weight[own],
    )


def repeat_prompts(groups: Sequence[Group]) -> list[Group]:
    """Return one group per answer, which gives the plain layout."""
    return [
        Group(prompt=group.prompt, answers=(answer,))
        for group in groups
        for answer in group.answers
    ]


def length_buckets(lengths: Sequence[int], slack: float = 1.25) -> list[list[int]]:
    """Return indices in buckets whose longest length is at most `slack` times the shortest.

    Zero lengths are left out. The longest bucket comes first.
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    buckets: list[list[int]] = []
    for i in order:
        if buckets and lengths[buckets[-1][0]] <= slack * lengths[i]:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    return buckets
