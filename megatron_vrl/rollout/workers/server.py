"""A rollout worker: one engine behind HTTP, for any number of trainer ranks.

One thread owns the engine and computes a token at a time for everything that is under way; between
two tokens it does what else was asked of it, so groups come and go as they please and weights may
arrive in the midst of an answer. The HTTP side only reads, waits and writes.

    GET  /health           -> Health
    POST /generate    Ask  -> Answered
    POST /weights/start, /weights/join (Join), /weights/finish (Version)
    POST /weights/load     framed Load, and the bucket's bytes if they follow
    POST /checksums        -> Checksums

Answers other than 200 carry one sentence: 401 the token is wrong; 409 the worker's state does not
allow it (no weights, older weights); 422 the request cannot be answered by any worker; 424 a
broadcast broke, and the weights must come another way.
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
from typing import Any, TypeVar

import torch
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import Bucket, BucketWriter, visible_gpus
from megatron_vrl.rollout.identity import Health, Identity, machine
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.rollout.workers.broadcast import Broken, Group, Join, own_host
from megatron_vrl.rollout.workers.protocol import (
    Answered,
    Ask,
    Checksums,
    Garbage,
    Load,
    Version,
    decode,
    encode,
    read_framed,
)
from megatron_vrl.types import Rollout

BROKEN = 3  # exit code: start me again
BROADCAST_TIMEOUT_S = 300  # for one bucket

Answer = TypeVar("Answer")
Message = TypeVar("Message")


class StateConflict(Exception):
    """The worker cannot do that now; another one may."""


class EngineThread:
    """The engine and the thread that alone may touch it."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._groups: dict[str, Future[list[Rollout]]] = {}
        self._updating = False
        self._late: list[Callable[[], None]] = []  # groups that came in the midst of an update
        self._inboxes: dict[str, BucketWriter] = {}  # for broadcasts, by device
        self._broadcasts: dict[str, tuple[Join, Group]] = {}  # by sender
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """What the function returned when it was run between two tokens."""
        future: Future[Any] = Future()
        self._calls.put((function, future))
        return future

    def generate(self, ask: Ask) -> "Future[list[Rollout]]":
        """What comes in the midst of an update is answered with the weights that it brings."""
        group: Future[list[Rollout]] = Future()
        key = uuid.uuid4().hex

        def submit() -> None:
            if self._updating:
                self._late.append(begin)
                return
            if group.cancelled():
                return
            if self.engine.version is None or self.engine.version < ask.version:
                raise StateConflict(
                    f"The worker holds weights {self.engine.version}, not {ask.version}."
                )
            self.engine.submit(key, ask.request, ask.spec)
            self._groups[key] = group

        def failed(submitted: "Future[Any]") -> None:
            error = submitted.exception()
            if error is not None and not group.cancelled():
                group.set_exception(error)

        def begin() -> None:
            self.call(submit).add_done_callback(failed)

        begin()
        group.add_done_callback(lambda _: self._forget(key) if group.cancelled() else None)
        return group

    def start_update(self) -> None:
        if self._updating:
            # vLLM cannot begin anew in the midst of an update; a new process can.
            _leave("an update of weights was broken off")
        self._updating = True
        self.engine.start_update()

    def join(self, join: Join) -> None:
        """Raises Broken."""
        if join.sender in self._broadcasts:
            self._broadcasts.pop(join.sender)[1].close()
        device = self.engine.device if join.backend == "nccl" else torch.device("cpu")
        here = replace(join, device=str(device))
        self._broadcasts[join.sender] = here, Group(here, own_host(f"{join.host}:{join.port}"))

    def load(self, load: Load) -> None:
        """Raises Broken."""
        bucket = load.bucket
        self.engine.load(self._received(load.group, bucket) if load.group else bucket)

    def _received(self, name: str, bucket: Bucket) -> Bucket:
        for sender, (join, group) in self._broadcasts.items():
            if join.name == name:
                here, memory = self._inbox(join.device).hold(bucket)
                try:
                    group.finish(group.start(memory), BROADCAST_TIMEOUT_S)
                except Broken:
                    group.close()
                    del self._broadcasts[sender]
                    raise
                return here
        raise Broken("it is not in that group")

    def _inbox(self, device: str) -> BucketWriter:
        if device not in self._inboxes:
            on = None if device == "cpu" else torch.device(device)
            self._inboxes[device] = BucketWriter(self.engine.dtype, on)
        return self._inboxes[device]

    def finish_update(self, version: int) -> None:
        self.engine.finish_update(version)
        self._updating = False
        late, self._late = self._late, []
        for begin in late:
            begin()

    def _forget(self, key: str) -> None:
        """Whoever asked has gone."""

        def abort() -> None:
            self._groups.pop(key, None)
            self.engine.abort([key])

        self.call(abort)

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except Exception:
            traceback.print_exc()
            _leave("the engine failed")

    def _turn(self) -> None:
        """What was asked since the last token, then the next token."""
        works = self.engine.busy and not self._updating
        while not (self._calls.empty() and works):
            function, future = self._calls.get()
            if future.set_running_or_notify_cancel():  # False: whoever asked has gone
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            works = self.engine.busy and not self._updating
        for key, rollouts in self.engine.step().items():
            group = self._groups.pop(key, None)
            if group is not None and group.set_running_or_notify_cancel():
                group.set_result(rollouts)


def make_app(engine: VllmEngine, identity: Identity, token: str) -> Starlette:
    """`token` "": none is asked for."""
    thread, instance, gpus = EngineThread(engine), uuid.uuid4().hex, visible_gpus()
    inboxes: list[BucketWriter] = []  # that nothing is received into

    async def health(_: bytes) -> Health:
        return Health(
            instance=instance,
            machine=machine(),
            gpus=gpus,
            identity=identity,
            version=engine.version,
        )

    async def generate(body: bytes) -> Answered:
        answer = asyncio.wrap_future(thread.generate(decode(body, Ask)))
        return Answered(rollouts=await answer)

    async def start(_: bytes) -> None:
        await asyncio.wrap_future(thread.call(thread.start_update))

    async def join(body: bytes) -> None:
        message = decode(body, Join)
        await asyncio.wrap_future(thread.call(lambda: thread.join(message)))

    async def load(received: tuple[Load, BucketWriter | None]) -> None:
        message, inbox = received
        loaded = thread.call(lambda: thread.load(message))
        if inbox is not None:
            loaded.add_done_callback(lambda _: inboxes.append(inbox))
        await asyncio.wrap_future(loaded)

    async def receive(request: HttpRequest) -> tuple[Load, BucketWriter | None]:
        pieces = request.stream()
        message, begin = await read_framed(pieces, Load)
        if not message.follows:
            return message, None
        inbox = inboxes.pop() if inboxes else BucketWriter(engine.dtype)
        try:
            bucket, _ = inbox.hold(message.bucket)
            await _fill(inbox.contents(bucket), begin, pieces)
        except BaseException:
            inboxes.append(inbox)
            raise
        return replace(message, bucket=bucket), inbox

    async def finish(body: bytes) -> None:
        version = decode(body, Version).version
        await asyncio.wrap_future(thread.call(lambda: thread.finish_update(version)))

    async def checksums(_: bytes) -> Checksums:
        return Checksums(by_name=await asyncio.wrap_future(thread.call(engine.weights_checksum)))

    whole = HttpRequest.body
    routes = [
        Route("/health", _endpoint(whole, health, token)),
        _post("/generate", _endpoint(whole, generate, token)),
        _post("/weights/start", _endpoint(whole, start, token)),
        _post("/weights/join", _endpoint(whole, join, token)),
        _post("/weights/load", _endpoint(receive, load, token)),
        _post("/weights/finish", _endpoint(whole, finish, token)),
        _post("/checksums", _endpoint(whole, checksums, token)),
    ]
    return Starlette(routes=routes)


async def _fill(memory: memoryview, begin: bytearray, pieces: AsyncIterator[bytes]) -> None:
    """Raises Garbage if the pieces are fewer or more than the memory."""
    end = len(begin)
    memory[:end] = begin[: len(memory)]
    async for piece in pieces:
        start, end = end, end + len(piece)
        if end <= len(memory):
            memory[start:end] = piece
    if end != len(memory):
        raise Garbage(f"a bucket of {len(memory)} bytes came with {end}")


async def _or_gone(http: HttpRequest, work: Awaitable[Answer]) -> Answer:
    """What the work gives; it is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(http.receive())  # the body has been read: only a goodbye can come
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    for unfinished in (task, gone):
        unfinished.cancel()
    return await task


def _post(path: str, endpoint: Callable[[HttpRequest], Awaitable[Response]]) -> Route:
    return Route(path, endpoint, methods=["POST"])


def _endpoint(
    read: Callable[[HttpRequest], Awaitable[Message]],
    does: Callable[[Message], Awaitable[Any]],
    token: str,
) -> Callable[[HttpRequest], Awaitable[Response]]:
    wanted = f"Bearer {token}"

    async def endpoint(request: HttpRequest) -> Response:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), wanted.encode()):
            return PlainTextResponse("The worker asks for its token.", 401)
        try:
            message = await read(request)
            return Response(encode(await _or_gone(request, does(message))))
        except StateConflict as error:
            return PlainTextResponse(str(error), 409)
        except (RolloutError, Garbage) as error:
            return PlainTextResponse(str(error), 422)
        except Broken as error:
            return PlainTextResponse(str(error), 424)

    return endpoint


def _leave(reason: str) -> None:
    print(f"worker: {reason}; starting again", file=sys.stderr)
    os._exit(BROKEN)
