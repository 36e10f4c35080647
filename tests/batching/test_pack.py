"""Packing: every answer token is a target once and is predicted by the right row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.batching.pack import Answer, Group, length_buckets, pack, repeat_prompts
from megatron_vrl.types import Prompt
from tests.tiny import prompt, video

VIDEO_PROMPT = prompt([video((2, 2, 4), 1.0, 0)], seed=0)


def asked(ids: list[int]) -> Prompt:
    """A prompt of these ids; packing looks at nothing else of it but its positions."""
    return Prompt(
        id=VIDEO_PROMPT.id,
        visuals=VIDEO_PROMPT.visuals,
        token_ids=np.array(ids),
        engine_token_ids=(),
        positions=np.broadcast_to(np.arange(len(ids)) * 2, (3, len(ids))),
    )


def answer(ids: list[int]) -> Answer:
    """Advantage and engine log-probs that say whose they are."""
    return Answer(
        token_ids=np.array(ids),
        advantage=float(sum(ids)),
        engine_logprobs=-np.array(ids, dtype=np.float32),
        id=str(ids),
    )


tokens = st.lists(st.integers(1, 99), min_size=1, max_size=6)
groups = st.builds(
    lambda p, answers: Group(prompt=asked(p), answers=tuple(map(answer, answers))),
    tokens,
    st.lists(tokens, min_size=1, max_size=4),
)
several = st.lists(groups, min_size=1, max_size=4)


@given(several, st.sampled_from([1, 2, 4]))
def test_every_target_is_predicted_from_prompt_and_answer_alone(
    members: list[Group], multiple: int
) -> None:
    batch = pack(members, multiple=multiple)
    assert len(batch.token_ids) % multiple == 0
    assert len(batch.token_ids) - sum(group.num_tokens for group in members) in range(multiple)
    answers = [(group, a) for group in members for a in group.answers]
    for index, (group, given_answer) in enumerate(answers):
        mine = batch.sequence == index
        assert batch.target[mine].tolist() == given_answer.token_ids.tolist()
        assert set(batch.advantage[mine]) == {np.float32(given_answer.advantage)}
        assert batch.answer_id[index] == given_answer.id
        assert batch.engine_logprob[mine].tolist() == given_answer.engine_logprobs.tolist()
        g = batch.answer_group[index]
        prompt_end = batch.prompt_start[g] + batch.prompt_length[g]
        start = batch.answer_start[index]
        inputs = slice(start, start + batch.answer_length[index])
        assert batch.token_ids[batch.prompt_start[g] : prompt_end].tolist() == (
            group.prompt.token_ids.tolist()
        )
        assert batch.token_ids[inputs].tolist() == given_answer.token_ids[:-1].tolist()
        # the first token by the prompt's last, each further one by the token before it
        assert batch.source[mine].tolist() == [prompt_end - 1, *range(inputs.start, inputs.stop)]
        first = group.prompt.positions.max() + 1
        assert (
            batch.positions[:, inputs].tolist()
            == [list(range(first, first + batch.answer_length[index]))] * 3
        )


@given(several)
def test_rows_of_prompts_and_answers_tile_the_batch(members: list[Group]) -> None:
    batch = pack(members)
    starts = np.concatenate([batch.prompt_start, batch.answer_start])
    lengths = np.concatenate([batch.prompt_length, batch.answer_length])
    rows = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    assert sorted(np.concatenate(rows)) == list(range(len(batch.token_ids)))


@given(several)
def test_plain_layout_has_the_same_targets(members: list[Group]) -> None:
    shared, plain = pack(members), pack(repeat_prompts(members))
    for name in ("target", "advantage", "engine_logprob", "sequence"):
        assert np.array_equal(getattr(shared, name), getattr(plain, name))
    assert len(plain.prompt_start) == len(plain.answer_start)
    sources = zip(shared.source, plain.source, strict=True)
    for mine, theirs in sources:
        assert shared.token_ids[mine] == plain.token_ids[theirs]
        assert np.array_equal(shared.positions[:, mine], plain.positions[:, theirs])


@given(st.lists(st.integers(0, 50), max_size=20), st.sampled_from([1.0, 1.25, 2.0]))
def test_buckets_hold_each_length_once_and_pad_little(lengths: list[int], slack: float) -> None:
    buckets = length_buckets(lengths, slack)
    flat = [index for bucket in buckets for index in bucket]
    assert sorted(flat) == [i for i, length in enumerate(lengths) if length > 0]
    for bucket in buckets:
        longest = max(lengths[i] for i in bucket)
        assert lengths[bucket[0]] == longest
        assert all(longest <= slack * lengths[i] for i in bucket)
