"""Packs groups of answers into micro-batches in which each prompt stands once.

Layout of a micro-batch: `[prompt | answer 1 | ... | answer n]` of one group after the other. Each
answer attends to its prompt and to itself; its positions continue the prompt's. The last token of
an answer predicts nothing, so it is a target but not an input. The first token of every answer is
predicted by the prompt's last token. `plain` repeats the prompt before each answer: the reference
that the shared layout must equal.

Shape letters: T packed tokens, N loss tokens, G groups, A answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.types import EncodedVideo, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to train on."""

    token_ids: NDArray[np.int64]  # [R]
    advantage: float
    engine_logprobs: NDArray[np.float32]  # [R] of the engine that sampled it; zeros for SFT


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt with the answers that are trained on it."""

    prompt: Prompt
    answers: tuple[Answer, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed for it in the shared layout."""
        return len(self.prompt.token_ids) + sum(len(a.token_ids) - 1 for a in self.answers)

    @property
    def num_targets(self) -> int:
        return sum(len(a.token_ids) for a in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass needs. Host arrays; the trainer moves them."""

    token_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [3, T]
    prompt_start: NDArray[np.int64]  # [G] index in T
    prompt_length: NDArray[np.int64]  # [G]
    answer_start: NDArray[np.int64]  # [A] index in T
    answer_length: NDArray[np.int64]  # [A] inputs, R - 1
    answer_group: NDArray[np.int64]  # [A] index in G
    videos: tuple[EncodedVideo, ...]  # in the order of their pad tokens in T
    source: NDArray[np.int64]  # [N] index in T of the token that predicts
    target: NDArray[np.int64]  # [N] token predicted
    advantage: NDArray[np.float32]  # [N]
    engine_logprob: NDArray[np.float32]  # [N]
    sequence: NDArray[np.int64]  # [N] index of the answer in A
    weight: NDArray[np.float32] = field()  # [N] of this token's loss in the step's loss


def pack(groups: Sequence[Group], *, pad_to: int = 1, pad_token: int = 0) -> MicroBatch:
    """Pack whole groups; T is padded to a multiple of `pad_to` (sequence parallel needs it).

    Weights are 1; see `weigh`.
    """
    tokens: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    rows: dict[str, list[int]] = {
        name: [] for name in ("p_start", "p_len", "a_start", "a_len", "a_group")
    }
    source: list[NDArray[np.int64]] = []
    end = 0
    for g, group in enumerate(groups):
        prompt_end = end + len(group.prompt.token_ids)
        rows["p_start"].append(end)
        rows["p_len"].append(prompt_end - end)
        tokens.append(group.prompt.token_ids)
        positions.append(group.prompt.positions)
        next_position = int(group.prompt.positions.max()) + 1
        end = prompt_end
        for answer in group.answers:
            inputs = answer.token_ids[:-1]
            source.append(np.concatenate([[prompt_end - 1], np.arange(end, end + len(inputs))]))
            rows["a_start"].append(end)
            rows["a_len"].append(len(inputs))
            rows["a_group"].append(g)
            tokens.append(inputs)
            steps = np.arange(next_position, next_position + len(inputs))
            positions.append(np.broadcast_to(steps, (3, len(inputs))))
            end += len(inputs)
    padding = -end % pad_to
    tokens.append(np.full(padding, pad_token))
    positions.append(np.zeros((3, padding), dtype=np.int64))
    answers = [answer for group in groups for answer in group.answers]
    lengths = [len(answer.token_ids) for answer in answers]
    return MicroBatch(
        token_ids=np.concatenate(tokens).astype(np.int64),
        positions=np.concatenate(positions, axis=1).astype(np.int64),
        prompt_start=np.array(rows["p_start"]),
        prompt_length=np.array(rows["p_len"]),
        answer_start=np.array(rows["a_start"]),
        answer_length=np.array(rows["a_len"]),
        answer_group=np.array(rows["a_group"]),
        videos=tuple(group.prompt.video for group in groups),
        source=np.concatenate(source).astype(np.int64),
        target=np.concatenate([answer.token_ids for answer in answers]),
        advantage=np.repeat([a.advantage for a in answers], lengths).astype(np.float32),
        engine_logprob=np.concatenate([a.engine_logprobs for a in answers]).astype(np.float32),
        sequence=np.repeat(np.arange(len(answers)), lengths),
        weight=np.ones(sum(lengths), dtype=np.float32),
    )


def as_plain(groups: Sequence[Group]) -> list[Group]:
    """The same answers with the prompt repeated for each: the reference layout."""
    return [
        Group(prompt=group.prompt, answers=(answer,))
        for group in groups
        for answer in group.answers
    ]


def split_by_tokens(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """First-fit-decreasing bins of at most `budget` tokens; a longer group is alone in its bin.

    Bins hold the groups in their given order, so the packing depends on nothing but the groups.
    """
    order = sorted(range(len(groups)), key=lambda i: (-groups[i].num_tokens, i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        size = groups[i].num_tokens
        fit = next((b for b, left in enumerate(room) if size <= left), None)
        if fit is None:
            bins.append([])
            room.append(budget)
            fit = len(bins) - 1
        bins[fit].append(i)
        room[fit] -= size
    return [[groups[i] for i in sorted(members)] for members in bins]


def length_buckets(lengths: Sequence[int], slack: float = 1.25) -> list[list[int]]:
    """Indices grouped so that padding each group to its longest costs at most `slack` times.

    Zero lengths are left out. Longest first.
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    buckets: list[list[int]] = []
    for i in order:
        if buckets and lengths[buckets[-1][0]] <= slack * lengths[i]:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    return buckets
