"""Messages between the trainer and rollout workers, as typed MessagePack.

Nothing is unpickled. A message is checked against its type while it is decoded, and bytes that do
not fit raise `InvalidMessage`.
"""

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
LENGTH_BYTES = 8  # length prefix of a framed message
# The trainer closes a connection that was idle for so long; a worker waits twice as long. A worker
# that closed first could close a connection just when the trainer reuses it, and would then seem to
# have failed.
IDLE_S = 30


class InvalidMessage(ValueError):
    """Bytes that are not a message of the expected type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Body of POST /generate."""

    request: RolloutRequest
    spec: SamplingSpec
    version: int  # oldest weights that may generate the response


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResponse:
    """Response of POST /generate."""

    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBucket:
    """Head of POST /weights/load."""

    bucket: WeightBucket
    follows: bool = False  # True: the bucket's bytes follow in the request's body
    group: str = ""  # name of the broadcast group that the bytes come from; "": none


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
    """Return the encoded message behind its length, so that other bytes may follow it."""
    data = encode(message)
    return len(data).to_bytes(LENGTH_BYTES) + data


async def read_framed(
    pieces: AsyncIterator[bytes], kind: type[Message]
) -> tuple[Message, bytearray]:
    """Return the message at the head of a stream, and the bytes read beyond it.

    Raises InvalidMessage.
    """
    data = bytearray()
    async for piece in pieces:
        data += piece
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES])
        if len(data) >= max(end, LENGTH_BYTES):
            return decode(bytes(data[LENGTH_BYTES:end]), kind), data[end:]
    raise InvalidMessage(f"not a {kind.__name__}: the stream ends within it")


def _array_to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        return {"dtype": value.dtype.str, "shape": value.shape, "data": data}
    raise TypeError(f"{type(value).__name__} cannot be encoded")


def _array_from_wire(kind: Any, value: Any) -> Any:
    dtype = np.dtype(value["dtype"])
    if dtype.hasobject:
        raise TypeError("an array of objects")
    flat = np.frombuffer(
        bytearray(value["data"]), dtype=dtype
    )  # bytearray: torch needs writable memory
    return flat.reshape(value["shape"])
