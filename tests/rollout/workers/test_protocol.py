"""Framed messages at the head of a stream, cut into chunks of any size."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from megatron_vrl.rollout.request import RolloutRequest
from megatron_vrl.rollout.workers.protocol import (
    HEAD_LIMIT,
    LENGTH_BYTES,
    CommitWeights,
    InvalidMessage,
    MessageTooLarge,
    decode,
    encode,
    framed,
    read_framed,
    read_whole,
)


async def pieces_of(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def read(data: bytes, size: int) -> tuple[CommitWeights, bytes]:
    async def message_and_rest() -> tuple[CommitWeights, bytes]:
        pieces = pieces_of(data, size)
        message, rest = await read_framed(pieces, CommitWeights)
        return message, bytes(rest) + b"".join([piece async for piece in pieces])

    return asyncio.run(message_and_rest())


@pytest.mark.parametrize("size", [1, 3, LENGTH_BYTES, 11, 1000])
@pytest.mark.parametrize("rest", [b"", b"weights" * 9])
def test_message_and_the_bytes_behind_it(size: int, rest: bytes) -> None:
    assert read(framed(CommitWeights(version=7)) + rest, size) == (CommitWeights(version=7), rest)


@pytest.mark.parametrize("size", [1, 1000])
def test_a_truncated_message_is_invalid(size: int) -> None:
    whole = framed(CommitWeights(version=7))
    for cut in range(len(whole)):
        with pytest.raises(InvalidMessage, match="not a CommitWeights"):
            read(whole[:cut], size)


@pytest.mark.parametrize("size", [1, 1000])
def test_messages_over_their_limit_are_not_read_on(size: int) -> None:
    with pytest.raises(MessageTooLarge, match=f"the limit is {HEAD_LIMIT}"):
        read((2**64 - 1).to_bytes(LENGTH_BYTES) + b"\x00", size)
    assert asyncio.run(read_whole(pieces_of(bytes(9), size), limit=9)) == bytes(9)
    with pytest.raises(MessageTooLarge, match="over 9 bytes"):
        asyncio.run(read_whole(pieces_of(bytes(10), size), limit=9))


@pytest.mark.parametrize("dtype", [",", "O", "<M8[ns]", "<f16", "f4,f4"])
def test_only_numbers_are_arrays_of_a_message(dtype: str) -> None:
    array = {"dtype": dtype, "shape": (0,), "data": b""}
    with pytest.raises(InvalidMessage, match="not a RolloutRequest: an array of dtype"):
        decode(encode({"id": "a", "token_ids": array}), RolloutRequest)
