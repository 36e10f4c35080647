"""Metrics of a rollout worker in the text format of Prometheus: `GET /metrics`.

mvrl_worker_calls_total{path, status}      HTTP calls that were answered
mvrl_worker_requests_running               prompts that the engine works on or that wait
mvrl_worker_prompt_tokens_total            prompt tokens of answered requests
mvrl_worker_response_tokens_total          tokens of their answers
mvrl_worker_request_seconds                histogram: from a request to its answers
mvrl_worker_weight_version                 -1 before the first weight sync
mvrl_worker_weight_sync_seconds            histogram: from /weights/begin to /weights/commit
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_vrl.rollout.workers.protocol import GenerateRequest
from megatron_vrl.types import Rollout

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)  # bounds of the histograms' buckets
NO_WEIGHTS = -1


class WorkerMetrics:
    """Counters of one worker.

    The thread of the worker's HTTP server makes every call, so there is no lock.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.calls = Counter(
            "mvrl_worker_calls", "HTTP calls", ("path", "status"), registry=registry
        )
        self._running = Gauge(
            "mvrl_worker_requests_running", "prompts in the engine", registry=registry
        )
        self._prompt_tokens = Counter(
            "mvrl_worker_prompt_tokens", "prompt tokens of answered requests", registry=registry
        )
        self._response_tokens = Counter(
            "mvrl_worker_response_tokens", "generated tokens", registry=registry
        )
        self._seconds = Histogram(
            "mvrl_worker_request_seconds", "request to answers", registry=registry, buckets=SECONDS
        )
        self._version = Gauge(
            "mvrl_worker_weight_version", "version of the weights", registry=registry
        )
        self._sync_seconds = Histogram(
            "mvrl_worker_weight_sync_seconds", "weight sync", registry=registry, buckets=SECONDS
        )
        self._version.set(NO_WEIGHTS)
        self._sync_began_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request while the block runs, and its seconds if the block does not raise."""
        with self._running.track_inprogress():
            began_s = time.monotonic()
            yield
            self._seconds.observe(time.monotonic() - began_s)

    def answered(self, request: GenerateRequest, rollouts: list[Rollout]) -> None:
        """Count the tokens of an answered request."""
        self._prompt_tokens.inc(len(request.request.token_ids))
        self._response_tokens.inc(sum(len(rollout.token_ids) for rollout in rollouts))

    def sync_began(self) -> None:
        """Start the time of a weight sync."""
        self._sync_began_s = time.monotonic()

    def sync_ended(self, version: int) -> None:
        """Record the time of a weight sync and its version."""
        self._sync_seconds.observe(time.monotonic() - self._sync_began_s)
        self._version.set(version)

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)
