"""HTTP to rollout workers, from a thread of its own with an event loop."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.identity import Health
from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE
from megatron_vrl.rollout.workers.protocol import IDLE_S, Garbage, decode

CONNECT_S = 2.0
PIECE_BYTES = 1 << 20

Result = TypeVar("Result")


class Fault(Exception):
    """What is wrong with a worker."""


class Unreachable(Fault):
    """Nobody listens there."""


class Undelivered(Fault):
    """The worker is well, but a broadcast to it broke."""


class WorkerClient:
    """`call` and `start` are for other threads; the coroutines run in the link's own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="rollout link", daemon=True).start()
        token = os.environ.get(TOKEN_VARIABLE, "")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = self.call(self._client())

    def start(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.start(work).result()

    async def health(self, address: str, timeout_s: float) -> Health:
        """Raises Fault."""
        try:
            # A machine that is gone does not even refuse.
            timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
            response = await self._http.get(f"http://{address}/health", timeout=timeout)
        except (httpx.HTTPError, OSError) as error:
            raise _fault(error) from None
        return decode_or_fault(_checked(response), Health)

    async def post(
        self, address: str, path: str, body: bytes, follows: memoryview | None = None
    ) -> bytes:
        """`follows`: bytes behind the body, sent from where they lie.

        Raises Fault, or RolloutError where the worker says that the request is at fault.
        """
        content: bytes | AsyncIterator[bytes] = body
        headers = {}
        if follows is not None:
            content = _pieces(body, follows)
            headers["Content-Length"] = str(len(body) + len(follows))
        try:
            response = await self._http.post(
                f"http://{address}/{path}", content=content, headers=headers
            )
        except (httpx.HTTPError, OSError) as error:
            raise _fault(error) from None
        if response.status_code == 422:
            raise RolloutError(response.text)
        return _checked(response)

    def close(self) -> None:
        self.call(self._http.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=None,  # each call has its own
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S),
            trust_env=False,  # workers are near: no proxy
        )


async def _pieces(body: bytes, follows: memoryview) -> AsyncIterator[bytes]:
    yield body
    for start in range(0, len(follows), PIECE_BYTES):
        yield bytes(follows[start : start + PIECE_BYTES])


def decode_or_fault(data: bytes, kind: type[Result]) -> Result:
    try:
        return decode(data, kind)
    except Garbage as error:
        raise Fault(f"garbage: {error}") from None


def _checked(response: httpx.Response) -> bytes:
    if response.status_code == 424:
        raise Undelivered(response.text)
    if response.status_code != 200:
        raise Fault(f"{response.status_code} {response.text[:200]}")
    return response.content


def _fault(error: Exception) -> Fault:
    kind = Unreachable if isinstance(error, httpx.ConnectError) else Fault
    return kind(f"{type(error).__name__} {error}".strip())
