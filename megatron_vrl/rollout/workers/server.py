"""Rollout worker: one inference engine behind HTTP, for any number of trainer ranks.

`EngineThread` calls the engine, which decodes one token at a time for all requests in flight.
Between two tokens the thread runs the calls that the HTTP handlers have queued. Requests therefore
start and end independently, and a weight sync may start in the middle of a rollout. The HTTP
handlers read requests, wait for the thread and write responses.

    GET  /health                             -> Health
    GET  /metrics                            -> text for Prometheus (worker_metrics.py)
    POST /generate        GenerateRequest    -> GenerateResponse
    POST /weights/begin
    POST /weights/join    JoinBroadcast
    POST /weights/load    LoadBucket, framed; the bucket's bytes follow if `follows`
    POST /weights/commit  CommitWeights
    POST /checksums                          -> ChecksumsResponse

The body of a response with another status than 200 is one sentence. 401: wrong token. 409: the
worker's state does not allow the call (no weights, older weights). 413: a message is larger than
MESSAGE_LIMIT. 422: no worker can fulfil the request. 424: a broadcast failed, and the bucket must
be sent by another transport.

States of a worker:

    NO WEIGHTS --/weights/begin--> SYNCING --/weights/commit--> SERVING --/weights/begin--> SYNCING

    NO WEIGHTS   /generate returns 409
    SYNCING      decoding stops; new requests wait and are answered with the new weights
    SERVING      requests are decoded

A /weights/begin while SYNCING means that a trainer did not finish its sync. vLLM cannot restart an
update, so the worker exits with code 3, and `launch/rollout_worker.sh` starts it again.

Example: two requests are in flight at version 4 and have 30 tokens each. /weights/begin stops
decoding. A third request arrives and waits. After /weights/commit with version 5 the first two
continue with the new weights (weight_version=4, newest_version=5), and the third starts with
version 5.
"""

import asyncio
import hmac
import os
import queue
import sys
import threading
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import BucketWriter, WeightBucket, visible_gpus
from megatron_vrl.rollout.interfaces import InferenceEngine
from megatron_vrl.rollout.workers.broadcast import (
    BroadcastError,
    BroadcastGroup,
    JoinBroadcast,
    own_host,
)
from megatron_vrl.rollout.workers.discovery import TOKEN_VARIABLE
from megatron_vrl.rollout.workers.protocol import (
    ChecksumsResponse,
    CommitWeights,
    GenerateRequest,
    GenerateResponse,
    InvalidMessage,
    LoadBucket,
    MessageTooLarge,
    decode,
    encode,
    read_framed,
    read_whole,
)
from megatron_vrl.rollout.workers.worker_info import Health, ServedModel, machine
from megatron_vrl.rollout.workers.worker_metrics import WorkerMetrics
from megatron_vrl.types import Rollout

RESTART = 3  # exit code after which launch/rollout_worker.sh starts the worker again
BROADCAST_TIMEOUT_S = 300  # timeout of one bucket

Result = TypeVar("Result")
Message = TypeVar("Message")


class StateConflict(Exception):
    """Call that the worker's current state does not allow. Another worker may accept it."""


class EngineThread:
    """Thread that alone calls the inference engine."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._requests: dict[str, Future[list[Rollout]]] = {}
        self._updating = False
        self._delayed: list[Callable[[], None]] = []  # requests that arrived during a weight sync
        self._receive_buffers: dict[
            str, BucketWriter
        ] = {}  # memory that broadcasts are received into, by device
        self._broadcasts: dict[str, tuple[JoinBroadcast, BroadcastGroup]] = {}  # by sender
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Run the function between two tokens and return its future."""
        future: Future[Any] = Future()
        self._calls.put((function, future))
        return future

    def generate(self, request: GenerateRequest) -> "Future[list[Rollout]]":
        """Start a request. Cancelling the future aborts it.

        A request that arrives during a weight sync is generated with the new weights.
        """
        rollouts: Future[list[Rollout]] = Future()
        key = uuid.uuid4().hex

        def submit() -> None:
            if self._updating:
                self._delayed.append(begin)
                return
            if rollouts.cancelled():
                return
            if self.engine.version is None or self.engine.version < request.version:
                raise StateConflict(
                    f"The worker holds weights {self.engine.version}, not {request.version}."
                )
            self.engine.submit(key, request.request, request.spec)
            self._requests[key] = rollouts

        def failed(submitted: "Future[Any]") -> None:
            error = submitted.exception()
            if error is not None and not rollouts.cancelled():
                rollouts.set_exception(error)

        def begin() -> None:
            self.call(submit).add_done_callback(failed)

        begin()
        rollouts.add_done_callback(
            lambda _: self._abort_request(key) if rollouts.cancelled() else None
        )
        return rollouts

    def start_update(self) -> None:
        """Begin a weight sync, or restart the process if the last sync was not finished."""
        if self._updating:
            _restart("a weight sync was not finished")
        self._updating = True
        self.engine.start_update()

    def join(self, join: JoinBroadcast) -> None:
        """Join a sender's broadcast group. Raises BroadcastError."""
        if join.sender in self._broadcasts:
            self._broadcasts.pop(join.sender)[1].close()
        device = self.engine.device if join.backend == "nccl" else torch.device("cpu")
        own = replace(join, device=str(device))
        group = BroadcastGroup(own, own_host(f"{join.host}:{join.port}"))
        self._broadcasts[join.sender] = own, group

    def load(self, load: LoadBucket, buffer: BucketWriter | None) -> None:
        """Load a bucket.

        `buffer`: memory of this process that holds the bucket; None if the bucket is in the
        trainer's memory or comes by broadcast. Raises BroadcastError.
        """
        bucket = load.bucket
        if load.group:
            buffer, bucket = self._receive_broadcast(load.group, bucket)
        if buffer is not None and self.engine.in_process:
            self.engine.load(buffer.tensors(bucket))
        else:
            self.engine.load(bucket)

    def _receive_broadcast(
        self, name: str, bucket: WeightBucket
    ) -> tuple[BucketWriter, WeightBucket]:
        """Return the memory that a broadcast was received into, and the bucket there."""
        for sender, (join, group) in self._broadcasts.items():
            if join.name == name:
                buffer = self._receive_buffer(join.device)
                received = buffer.reserve(bucket)
                try:
                    group.finish(group.start(buffer.flat(received)), BROADCAST_TIMEOUT_S)
                except BroadcastError:
                    group.close()
                    del self._broadcasts[sender]
                    raise
                return buffer, received
        raise BroadcastError("the worker is not in that broadcast group")

    def _receive_buffer(self, device: str) -> BucketWriter:
        if device not in self._receive_buffers:
            gpu = None if device == "cpu" else torch.device(device)
            self._receive_buffers[device] = BucketWriter(self.engine.dtype, gpu)
        return self._receive_buffers[device]

    def finish_update(self, version: int) -> None:
        """End a weight sync and start the requests that arrived during it."""
        self.engine.finish_update(version)
        self._updating = False
        delayed, self._delayed = self._delayed, []
        for begin in delayed:
            begin()

    def _abort_request(self, key: str) -> None:
        """Drop a request whose client has disconnected."""

        def abort() -> None:
            self._requests.pop(key, None)
            self.engine.abort([key])

        self.call(abort)

    def _run(self) -> None:
        try:
            while True:
                self._run_calls_and_step()
        except Exception:
            traceback.print_exc()
            _restart("the engine failed")

    def _run_calls_and_step(self) -> None:
        """Run the queued calls, then decode one token; without requests, wait for a call."""
        can_step = self.engine.busy and not self._updating
        while not (self._calls.empty() and can_step):
            function, future = self._calls.get()
            if future.set_running_or_notify_cancel():  # False: the client disconnected
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            can_step = self.engine.busy and not self._updating
        for key, rollouts in self.engine.step().items():
            request = self._requests.pop(key, None)
            if request is not None and request.set_running_or_notify_cancel():
                request.set_result(rollouts)


def make_app(engine: InferenceEngine, served_model: ServedModel, token: str) -> Starlette:
    """Return the worker's HTTP application. With `token` "" requests need no token."""
    thread, instance, gpus = EngineThread(engine), uuid.uuid4().hex, visible_gpus()
    free_buffers: list[BucketWriter] = []  # buffers for buckets sent by http
    counted = WorkerMetrics()

    async def health(_: bytes) -> Health:
        return Health(
            instance=instance,
            machine=machine(),
            gpus=gpus,
            served_model=served_model,
            version=engine.version,
        )

    async def generate(body: bytes) -> GenerateResponse:
        message = decode(body, GenerateRequest)
        with counted.running():
            rollouts = await asyncio.wrap_future(thread.generate(message))
        counted.answered(message, rollouts)
        return GenerateResponse(rollouts=rollouts)

    async def begin(_: bytes) -> None:
        counted.sync_began()
        await asyncio.wrap_future(thread.call(thread.start_update))

    async def join(body: bytes) -> None:
        message = decode(body, JoinBroadcast)
        await asyncio.wrap_future(thread.call(lambda: thread.join(message)))

    async def load(received: tuple[LoadBucket, BucketWriter | None]) -> None:
        message, buffer = received
        loaded = thread.call(lambda: thread.load(message, buffer))
        if buffer is not None:
            loaded.add_done_callback(lambda _: free_buffers.append(buffer))
        await asyncio.wrap_future(loaded)

    async def receive(request: HttpRequest) -> tuple[LoadBucket, BucketWriter | None]:
        chunks = request.stream()
        message, head = await read_framed(chunks, LoadBucket)
        if not message.follows:
            return message, None
        buffer = free_buffers.pop() if free_buffers else BucketWriter(engine.dtype)
        try:
            bucket = buffer.reserve(message.bucket)
            await _fill(buffer.contents(bucket), head, chunks)
        except BaseException:
            free_buffers.append(buffer)
            raise
        return replace(message, bucket=bucket), buffer

    async def commit(body: bytes) -> None:
        version = decode(body, CommitWeights).version
        await asyncio.wrap_future(thread.call(lambda: thread.finish_update(version)))
        counted.sync_ended(version)

    async def checksums(_: bytes) -> ChecksumsResponse:
        by_name = await asyncio.wrap_future(thread.call(engine.weights_checksum))
        return ChecksumsResponse(by_name=by_name)

    async def metrics(_: bytes) -> Response:
        return PlainTextResponse(counted.text())

    endpoint = partial(_endpoint, counted, token)
    routes = [
        Route("/health", endpoint(_body, health)),
        Route("/metrics", endpoint(_body, metrics)),
        _post("/generate", endpoint(_body, generate)),
        _post("/weights/begin", endpoint(_body, begin)),
        _post("/weights/join", endpoint(_body, join)),
        _post("/weights/load", endpoint(receive, load)),
        _post("/weights/commit", endpoint(_body, commit)),
        _post("/checksums", endpoint(_body, checksums)),
    ]
    return Starlette(routes=routes)


async def _body(request: HttpRequest) -> bytes:
    return await read_whole(request.stream())


async def _fill(memory: memoryview, head: bytearray, chunks: AsyncIterator[bytes]) -> None:
    """Copy `head` and the chunks into the memory.

    Raises InvalidMessage if the number of bytes differs from the size of the memory.
    """
    end = len(head)
    memory[:end] = head[: len(memory)]
    async for chunk in chunks:
        start, end = end, end + len(chunk)
        if end <= len(memory):
            memory[start:end] = chunk
    if end != len(memory):
        raise InvalidMessage(f"a bucket of {len(memory)} bytes arrived with {end} bytes")


async def _unless_disconnected(http: HttpRequest, work: Awaitable[Result]) -> Result:
    """Return the result of `work`, which is cancelled when the client disconnects."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(http.receive())  # the body has been read already
    await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
    for unfinished in (task, disconnect):
        unfinished.cancel()
    return await task


def _post(path: str, endpoint: Callable[[HttpRequest], Awaitable[Response]]) -> Route:
    return Route(path, endpoint, methods=["POST"])


def _endpoint(
    counted: WorkerMetrics,
    token: str,
    read: Callable[[HttpRequest], Awaitable[Message]],
    handle: Callable[[Message], Awaitable[Any]],
) -> Callable[[HttpRequest], Awaitable[Response]]:
    """Return an endpoint that checks the token, reads a message, calls `handle` and is counted."""
    expected = f"Bearer {token}"

    async def endpoint(request: HttpRequest) -> Response:
        response = await answer(request)
        counted.calls.labels(request.url.path, response.status_code).inc()
        return response

    async def answer(request: HttpRequest) -> Response:
        authorization = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(authorization.encode(), expected.encode()):
            return PlainTextResponse(f"The worker needs the token of {TOKEN_VARIABLE}.", 401)
        try:
            message = await read(request)
            answered = await _unless_disconnected(request, handle(message))
            return answered if isinstance(answered, Response) else Response(encode(answered))
        except MessageTooLarge as error:
            return PlainTextResponse(str(error), 413)
        except StateConflict as error:
            return PlainTextResponse(str(error), 409)
        except (RolloutError, InvalidMessage) as error:
            return PlainTextResponse(str(error), 422)
        except BroadcastError as error:
            return PlainTextResponse(str(error), 424)

    return endpoint


def _restart(reason: str) -> None:
    """End the process at once, with the exit code after which the launch script starts it again."""
    print(f"worker: {reason}; restarting", file=sys.stderr)
    os._exit(RESTART)
