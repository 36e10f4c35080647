"""What travels between a trainer and a rollout worker: typed messages, as MessagePack.

Nothing is ever unpickled, and a message is checked against its type as it is read: whatever does
not fit is `Garbage`.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from megatron_vrl.rollout.buckets import Bucket
from megatron_vrl.rollout.request import Request, SamplingSpec
from megatron_vrl.types import Rollout

Message = TypeVar("Message")
LENGTH_BYTES = 8  # of a message that more bytes follow
# After so long unused a trainer closes a connection. A worker waits twice as long: were it the
# first, it could close one that is just being used, and would look lost.
IDLE_S = 30


class Garbage(ValueError):
    """Bytes that are not the message they should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    request: Request
    spec: SamplingSpec
    version: int  # the oldest weights that may answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    bucket: Bucket
    follows: bool = False  # the bucket's bytes, behind the message
    group: str = ""  # which the bytes come from by broadcast


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksums:
    by_name: dict[str, str]


def encode(message: Any) -> bytes:
    return msgspec.msgpack.encode(message, enc_hook=_array_to_wire)


def decode(data: bytes, kind: type[Message]) -> Message:
    """Raises Garbage."""
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=_array_from_wire)
    except (msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
        raise Garbage(f"not a {kind.__name__}: {error}") from None


def framed(message: Any) -> bytes:
    """With its length before it, so that other bytes may follow."""
    data = encode(message)
    return len(data).to_bytes(LENGTH_BYTES) + data


async def read_framed(
    pieces: AsyncIterator[bytes], kind: type[Message]
) -> tuple[Message, bytearray]:
    """The message that begins a stream, and what was read beyond it. Raises Garbage."""
    data = bytearray()
    async for piece in pieces:
        data += piece
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES])
        if len(data) >= max(end, LENGTH_BYTES):
            return decode(bytes(data[LENGTH_BYTES:end]), kind), data[end:]
    raise Garbage(f"not a {kind.__name__}: it breaks off")


def _array_to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        return {"dtype": value.dtype.str, "shape": value.shape, "data": data}
    raise TypeError(f"{type(value).__name__} has no form on the wire")


def _array_from_wire(kind: Any, value: Any) -> Any:
    dtype = np.dtype(value["dtype"])
    if dtype.hasobject:
        raise TypeError("an array of objects")
    flat = np.frombuffer(bytearray(value["data"]), dtype=dtype)  # writable, as torch wants it
    return flat.reshape(value["shape"])
