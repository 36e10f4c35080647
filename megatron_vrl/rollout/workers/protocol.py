"""Messages between the trainer and rollout workers, as typed MessagePack.

Decoding uses no pickle and checks a message against its type. Bytes that are no message of this
type raise `InvalidMessage`.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from megatron_vrl.rollout.buckets import WeightBucket
from megatron_vrl.rollout.interfaces import Checksums
from megatron_vrl.rollout.request import RolloutRequest, SamplingSpec
from megatron_vrl.types import Rollout

Message = TypeVar("Message")
DTYPE = re.compile(r"[<|][bifu][1248]")  # np.dtype evaluates other texts
LENGTH_BYTES = 8  # length prefix of a framed message
HEAD_LIMIT = 2**26  # bytes of a framed message, without what follows it
MESSAGE_LIMIT = 2**32  # bytes of any other message; a video at vLLM's largest size has 0.7e9
# The trainer closes a connection after this idle time, a worker after twice the time. If a worker
# closed a connection first, the trainer could be about to reuse the connection, and the worker
# would seem to have failed.
IDLE_S = 30


class InvalidMessage(ValueError):
    """Bytes that are not a message of the expected type."""


class MessageTooLarge(InvalidMessage):
    """Message over its limit of bytes. The rest of the message is not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Body of POST /generate."""

    request: RolloutRequest
    spec: SamplingSpec
    version: int  # oldest weight version that may generate the response


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResponse:
    """Response of POST /generate."""

    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBucket:
    """First part of the body of POST /weights/load."""

    bucket: WeightBucket
    follows: bool = False  # True: the bucket's bytes follow in the request's body
    group: str = ""  # name of the broadcast group that sends the bytes; "": no broadcast


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitWeights:
    """Body of POST /weights/commit."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksumsResponse:
    """Response of POST /checksums."""

    by_name: Checksums


def encode(message: Any) -> bytes:
    """Return a message as bytes. Arrays become dtype, shape and raw data."""
    return msgspec.msgpack.encode(message, enc_hook=_array_to_wire)


def decode(data: bytes, kind: type[Message]) -> Message:
    """Return the message of type `kind`. Raises InvalidMessage."""
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=_array_from_wire)
    except (msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
        raise InvalidMessage(f"not a {kind.__name__}: {error}") from None


def framed(message: Any) -> bytes:
    """Return the length of the encoded message and the message, so that other bytes may follow."""
    data = encode(message)
    return len(data).to_bytes(LENGTH_BYTES) + data


async def read_framed(
    pieces: AsyncIterator[bytes], kind: type[Message]
) -> tuple[Message, bytearray]:
    """Return the first message of a stream, and the bytes that were read after it.

    Raises InvalidMessage.
    """
    data = bytearray()
    async for piece in pieces:
        data += piece
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES])
        if len(data) >= LENGTH_BYTES and end > HEAD_LIMIT:
            raise MessageTooLarge(f"a {kind.__name__} of {end} bytes; the limit is {HEAD_LIMIT}")
        if len(data) >= max(end, LENGTH_BYTES):
            return decode(bytes(data[LENGTH_BYTES:end]), kind), data[end:]
    raise InvalidMessage(f"not a {kind.__name__}: the stream ends before the message does")


async def read_whole(pieces: AsyncIterator[bytes], limit: int = MESSAGE_LIMIT) -> bytes:
    """Return all bytes of a stream. Raises MessageTooLarge at the first piece over `limit`."""
    kept, count = [], 0
    async for piece in pieces:
        kept.append(piece)
        count += len(piece)
        if count > limit:
            raise MessageTooLarge(f"a message of over {limit} bytes")
    return b"".join(kept)


def _array_to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        return {"dtype": value.dtype.str, "shape": value.shape, "data": data}
    raise TypeError(f"{type(value).__name__} cannot be encoded")


def _array_from_wire(kind: Any, value: Any) -> Any:
    if not DTYPE.fullmatch(value["dtype"]):
        raise TypeError(f"an array of dtype {value['dtype']!r:.40}")
    dtype = np.dtype(value["dtype"])
    flat = np.frombuffer(
        bytearray(value["data"]), dtype=dtype
    )  # bytearray: torch needs writable memory
    return flat.reshape(value["shape"])
