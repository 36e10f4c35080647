"""Rollout workers as the trainer sees them: request routing, health and weight syncs.

States of a worker, as one trainer rank sees it:

    UNKNOWN --wait_ready--> READY --push, commit--> ACTIVE --failure--> LOST --next sync--> READY

    UNKNOWN   the address is known from rollout.workers or rollout.discovery_dir
    READY     the worker answers its health check and serves the trainer's model
    ACTIVE    the worker holds the weights (`activate`) and receives requests
    LOST      the worker receives no requests until it takes part in another weight sync

A worker is lost if it refuses connections, answers no health check for `heartbeat_timeout_s`, takes
longer than `request_timeout_s` for a request, was restarted, returns an invalid response, or
returns rollouts of old weights.

States of a request (`submit`):

    WAITING --worker has room--> SENT --valid response--> DONE
       ^                          |
       +------- worker lost ------+   after MAX_ATTEMPTS lost workers the future raises

Example: max_num_seqs=16 and n=8, so a worker has room for 2 requests. Of 5 requests and 2 active
workers, 4 are sent and 1 waits. Worker B is lost, so its 2 requests wait again. Worker A finishes a
request and gets the next one. If A is lost as well, `no_live_workers` is True, and the next weight
sync activates workers, which get the remaining requests.

Each request gets exactly one response. A late response of a lost worker is discarded, since its
connection is closed. Each rank has its own WorkerPool; `weight_sync.py` coordinates the ranks.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields

import torch

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import NamedTensors, torch_dtype
from megatron_vrl.rollout.interfaces import Checksums
from megatron_vrl.rollout.request import RolloutRequest, SamplingSpec, check_length, make_request
from megatron_vrl.rollout.workers.client import (
    WorkerClient,
    WorkerError,
    WorkerUnreachable,
    decode_response,
)
from megatron_vrl.rollout.workers.discovery import announced_addresses
from megatron_vrl.rollout.workers.protocol import (
    ChecksumsResponse,
    GenerateRequest,
    GenerateResponse,
    encode,
)
from megatron_vrl.rollout.workers.weight_sender import WeightSender, log
from megatron_vrl.rollout.workers.worker_info import Health, ServedModel, WorkerInfo
from megatron_vrl.types import Prompt, Rollout

POLL_INTERVAL_S = 0.5
MAX_ATTEMPTS = 4  # attempts of a request; then the request is taken as the cause of the failures


@dataclass(slots=True)
class _LiveWorker:
    """An ACTIVE worker; `lost` is set when it becomes LOST."""

    info: WorkerInfo
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0  # in flight, from this rank


class WorkerPool:
    """Generator over all active workers, and this rank's part of the weight syncs with them."""

    needs_weights = False  # active workers keep theirs

    def __init__(
        self, cfg: config.RolloutConfig, served_model: ServedModel, device: torch.device
    ) -> None:
        """`device`: device of this rank's weights."""
        self.version: int | None = None  # version of the weights that active workers hold
        self._cfg, self._served_model = cfg, served_model
        self._workers: dict[str, _LiveWorker] = {}  # active workers by address
        self._client = WorkerClient()
        self._sender = WeightSender(
            cfg.transport, torch_dtype(served_model.dtype), device, self._client
        )
        self._room_event = self._client.call(_new_event())

    # Generation.

    def submit(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> list[Future[list[Rollout]]]:
        """Send the prompts to workers and return one future for each prompt.

        Raises RolloutError if a prompt does not fit the workers' engines.
        """
        requests = [make_request(prompt) for prompt in prompts]
        for request, spec in zip(requests, specs, strict=True):
            check_length(request, spec, self._served_model.max_model_len)
        version = self._known_version()
        return [
            self._client.start(self._generate(request, spec, version))
            for request, spec in zip(requests, specs, strict=True)
        ]

    @property
    def no_live_workers(self) -> bool:
        """True when no worker is active."""
        return not self._workers

    async def _generate(
        self, request: RolloutRequest, spec: SamplingSpec, version: int
    ) -> list[Rollout]:
        """Return the rollouts of one request, from the first worker that does not fail on it."""
        body = encode(GenerateRequest(request=request, spec=spec, version=version))
        for _ in range(MAX_ATTEMPTS):
            worker = await self._worker_with_room(spec.n)
            worker.requests += 1
            try:
                rollouts = await self._send(worker, body)
                self._check_rollouts(rollouts, spec, version)
            except WorkerError as error:
                self._mark_lost(worker, f"sample {request.id}: {error}")
            else:
                return rollouts
            finally:
                worker.requests -= 1
                self._wake_waiting_requests()
        raise RolloutError(
            f"Sample {request.id}: {MAX_ATTEMPTS} workers failed while they generated its "
            "rollouts: look at their output, and at the sample."
        )

    async def _send(self, worker: _LiveWorker, body: bytes) -> list[Rollout]:
        """Return the worker's response.

        Raises WorkerError, or RolloutError if no worker can fulfil the request.
        """
        response = asyncio.ensure_future(self._client.post(worker.info.address, "generate", body))
        lost = asyncio.ensure_future(worker.lost.wait())
        await asyncio.wait(
            [response, lost],
            timeout=self._cfg.request_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        lost.cancel()
        if response.done():
            return decode_response(response.result(), GenerateResponse).rollouts
        response.cancel()
        if worker.lost.is_set():
            raise WorkerError("the worker was lost")
        raise WorkerError(f"no response within request_timeout_s={self._cfg.request_timeout_s:g}")

    async def _worker_with_room(self, n: int) -> _LiveWorker:
        """Wait for room and return the active worker with the fewest requests.

        Requests wait in the trainer and not in a worker's queue, so that a slow worker holds few of
        them.
        """

        def has_room(worker: _LiveWorker) -> bool:
            sequences = self._cfg.num_seqs(on_gpu=bool(worker.info.gpus))
            return worker.requests < max(1, -(-sequences // n))

        while True:
            with_room = [worker for worker in self._workers.values() if has_room(worker)]
            if with_room:
                return min(with_room, key=lambda worker: worker.requests)
            await self._room_event.wait()

    def _check_rollouts(
        self, rollouts: Sequence[Rollout], spec: SamplingSpec, version: int
    ) -> None:
        """Raise WorkerError for rollouts that this spec and these weights cannot produce."""
        if len(rollouts) != spec.n:
            raise WorkerError(f"{len(rollouts)} rollouts instead of {spec.n}")
        for index, rollout in enumerate(rollouts):
            if not 0 < len(rollout.token_ids) == len(rollout.logprobs) <= spec.max_tokens:
                raise WorkerError(
                    f"{len(rollout.token_ids)} tokens with {len(rollout.logprobs)} log-probs"
                )
            if rollout.seed != spec.seed + index:
                raise WorkerError(f"seed {rollout.seed} instead of {spec.seed + index}")
            if (
                not version
                <= rollout.weight_version
                <= rollout.newest_version
                <= self._newest_allowed_version()
            ):
                raise WorkerError(f"weights {rollout.weight_version} instead of {version}")

    # Weight sync.

    def wait_ready(self, min_workers: int) -> list[WorkerInfo]:
        """Return the workers that are reachable now, at least `min_workers`.

        Raises RolloutError if fewer are reachable within `worker_wait_timeout_s`, or if one serves
        another model.
        """
        return self._client.call(self._wait_ready(min_workers))

    def begin_sync(self, workers: Sequence[WorkerInfo]) -> None:
        """Invalidate the workers' weights. One rank calls this method, before any rank pushes."""
        self._sender.begin_sync(workers)

    def serialize_stages(self, workers: Sequence[WorkerInfo]) -> bool:
        """Return True if pipeline stages must send one after another."""
        return self._sender.serialize_stages(workers)

    def push(self, workers: Sequence[WorkerInfo], tensors: NamedTensors) -> None:
        """Send one bucket, which is in flight until `flush`.

        One rank of each pipeline stage calls this method.
        """
        self._sender.push(workers, tensors)

    def flush(self) -> None:
        """Wait until the workers have loaded the bucket in flight."""
        self._sender.flush()

    def commit(self, workers: Sequence[WorkerInfo], version: int) -> None:
        """End a weight sync. One rank calls this method, after all ranks have flushed."""
        self._sender.commit(workers, version)

    @property
    def failed(self) -> set[str]:
        """Return the addresses of workers that failed to load weights from this rank."""
        return self._sender.failed

    def activate(self, workers: Sequence[WorkerInfo], version: int) -> None:
        """Send requests to exactly these workers from now on. Every rank calls this method.

        `version`: version of the weights that these workers hold.
        """
        self.version = version
        self._sender.forget_failures()
        self._client.call(self._activate(workers))

    def checksums(self) -> dict[str, Checksums]:
        """Return SHA-256 of every live weight by address. Raises RolloutError."""
        return {
            address: self._client.call(self._checksums(address)) for address in list(self._workers)
        }

    def close(self) -> None:
        self._sender.close()
        self._client.close()

    async def _wait_ready(self, min_workers: int) -> list[WorkerInfo]:
        deadline = self._client.loop.time() + self._cfg.worker_wait_timeout_s
        while True:
            addresses = list(
                dict.fromkeys([*self._cfg.workers, *announced_addresses(self._cfg.discovery_dir)])
            )
            states = await asyncio.gather(*(self._health(a) for a in addresses))
            ready = {a: s for a, s in zip(addresses, states, strict=True) if isinstance(s, Health)}
            for address, health in ready.items():
                self._check_served_model(address, health)
            if len(ready) >= min_workers:
                return [WorkerInfo(a, h.instance, h.machine, h.gpus) for a, h in ready.items()]
            if self._client.loop.time() > deadline:
                states_text = "; ".join(f"{a}: {s}" for a, s in zip(addresses, states, strict=True))
                raise RolloutError(
                    f"{len(ready)} of at least {min_workers} rollout workers were ready within "
                    f"rollout.worker_wait_timeout_s={self._cfg.worker_wait_timeout_s:g} "
                    f"({states_text or 'no address is known'}): start workers with "
                    "launch/rollout_worker.sh, and set rollout.workers or rollout.discovery_dir."
                )
            await asyncio.sleep(POLL_INTERVAL_S)

    def _check_served_model(self, address: str, health: Health) -> None:
        for name in (one.name for one in fields(ServedModel)):
            theirs, ours = getattr(health.served_model, name), getattr(self._served_model, name)
            if theirs != ours:
                raise RolloutError(
                    f"The worker at {address} serves {name} {theirs}, the trainer {ours}: start it "
                    "with the trainer's config."
                )

    async def _activate(self, workers: Sequence[WorkerInfo]) -> None:
        for live in list(self._workers.values()):
            if live.info not in workers:
                self._mark_lost(live, "it was not in the weight sync")
        for info in workers:
            if info.address not in self._workers:
                live = self._workers[info.address] = _LiveWorker(info)
                self._client.spawn(self._watch(live))
        self._wake_waiting_requests()

    async def _checksums(self, address: str) -> Checksums:
        try:
            response = await self._client.post(address, "checksums", b"")
            return decode_response(response, ChecksumsResponse).by_name
        except WorkerError as error:
            raise RolloutError(
                f"The worker at {address} returns no checksums ({error}): look at its output."
            ) from None

    # One worker.

    async def _watch(self, worker: _LiveWorker) -> None:
        """Poll the worker's health until it is lost."""
        last_response = self._client.loop.time()
        while not worker.lost.is_set():
            state = await self._health(worker.info.address)
            silent_s = self._client.loop.time() - last_response
            if isinstance(state, Health):
                last_response = self._client.loop.time()
                if state.instance != worker.info.instance:
                    self._mark_lost(worker, "it was restarted")
            elif isinstance(state, WorkerUnreachable) or silent_s > self._cfg.heartbeat_timeout_s:
                self._mark_lost(worker, f"no health response for {silent_s:.1f} s: {state}")
            await asyncio.sleep(min(POLL_INTERVAL_S, self._cfg.heartbeat_timeout_s / 4))

    def _mark_lost(self, worker: _LiveWorker, reason: str) -> None:
        """Make the worker LOST: its requests wait for other workers."""
        if not worker.lost.is_set():
            worker.lost.set()
            if self._workers.get(worker.info.address) is worker:
                del self._workers[worker.info.address]
            log(f"lost {worker.info.address}: {reason}")
            self._wake_waiting_requests()

    async def _health(self, address: str) -> Health | WorkerError:
        try:
            return await self._client.health(address, max(0.1, self._cfg.heartbeat_timeout_s / 2))
        except WorkerError as error:
            return error

    def _wake_waiting_requests(self) -> None:
        """Wake the requests that wait for a worker with room."""
        self._room_event.set()
        self._room_event = asyncio.Event()

    def _known_version(self) -> int:
        if self.version is None:
            raise RolloutError("The workers have no weights yet: sync weights first.")
        return self.version

    def _newest_allowed_version(self) -> int:
        """Newest version that a response may have.

        During a weight sync a worker may respond with the next version before `activate`.
        """
        return self._known_version() + 1


async def _new_event() -> asyncio.Event:
    return asyncio.Event()
