"""HTTP client of rollout workers, with an event loop in a thread of its own."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE
from megatron_vrl.rollout.workers.protocol import IDLE_S, InvalidMessage, decode
from megatron_vrl.rollout.workers.worker_info import Health

CONNECT_TIMEOUT_S = 2.0
CHUNK_BYTES = 1 << 20

Result = TypeVar("Result")


class WorkerError(Exception):
    """Failure of one worker. The trainer goes on without the worker."""


class WorkerUnreachable(WorkerError):
    """Connection refused: no process listens at the address."""


class BucketNotReceived(WorkerError):
    """A worker did not receive a bucket by broadcast, and is otherwise healthy."""


class WorkerClient:
    """Client for all workers. Other threads use `start`, `call` and `close`; coroutines, and
    `spawn`, run in the client's own event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="rollout client", daemon=True).start()
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself holds tasks weakly
        token = os.environ.get(TOKEN_VARIABLE, "")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = self.call(self._client())

    def start(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Run the coroutine in the client's event loop and return its future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run the coroutine in the client's event loop and return its result."""
        return self.start(work).result()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a background task; for coroutines of the client's event loop."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def health(self, address: str, timeout_s: float) -> Health:
        """Return the worker's health. Raises WorkerError."""
        try:
            # A machine that is switched off does not refuse a connection.
            timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
            response = await self._http.get(f"http://{address}/health", timeout=timeout)
        except (httpx.HTTPError, OSError) as error:
            raise _worker_error(error) from None
        return decode_response(_checked(response), Health)

    async def post(
        self, address: str, path: str, body: bytes, follows: memoryview | None = None
    ) -> bytes:
        """Send a POST request and return the response's body.

        follows: bytes sent behind `body`, without a copy of the whole.
        Raises WorkerError, or RolloutError if no worker can fulfil the request (status 422).
        """
        content: bytes | AsyncIterator[bytes] = body
        headers = {}
        if follows is not None:
            content = _chunks(body, follows)
            headers["Content-Length"] = str(len(body) + len(follows))
        try:
            response = await self._http.post(
                f"http://{address}/{path}", content=content, headers=headers
            )
        except (httpx.HTTPError, OSError) as error:
            raise _worker_error(error) from None
        if response.status_code == 422:
            raise RolloutError(response.text)
        return _checked(response)

    def close(self) -> None:
        """Cancel background tasks, close all connections and stop the event loop."""
        self.call(self._shut_down())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _shut_down(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    async def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=None,  # each call has its own timeout
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S),
            trust_env=False,  # no proxy
        )


async def _chunks(body: bytes, follows: memoryview) -> AsyncIterator[bytes]:
    yield body
    for start in range(0, len(follows), CHUNK_BYTES):
        yield bytes(follows[start : start + CHUNK_BYTES])


def decode_response(data: bytes, kind: type[Result]) -> Result:
    """Return the message of type `kind`. Raises WorkerError for other bytes."""
    try:
        return decode(data, kind)
    except InvalidMessage as error:
        raise WorkerError(f"invalid response: {error}") from None


def _checked(response: httpx.Response) -> bytes:
    if response.status_code == 424:
        raise BucketNotReceived(response.text)
    if response.status_code != 200:
        raise WorkerError(f"{response.status_code} {response.text[:200]}")
    return response.content


def _worker_error(error: Exception) -> WorkerError:
    kind = WorkerUnreachable if isinstance(error, httpx.ConnectError) else WorkerError
    return kind(f"{type(error).__name__} {error}".strip())
