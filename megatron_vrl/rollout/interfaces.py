"""Interfaces between the trainer, the sources of rollouts and the inference engine.

A placement (`rollout.placement`) gives `RolloutManager` a Generator and a WeightSync:

    placement   Generator         WeightSync
    colocated   InProcessEngine   InProcessSync   every rank pushes into its own engine
    workers     WorkerPool        WorkerSync      each pipeline stage sends its own layers
    replay      ReplayEngine      ReplayEngine    only the version number is recorded

`InferenceEngine` is what a backend (`rollout.backend`) provides. With placement
`colocated` every trainer rank has an engine; with `workers` every rollout worker has one.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_vrl.rollout.buckets import NamedTensors, WeightBucket
from megatron_vrl.rollout.request import RolloutRequest, SamplingSpec
from megatron_vrl.types import Prompt, Rollout

Checksums = dict[str, str]  # HF tensor name -> SHA-256


class RolloutFuture(Protocol):
    """Future of the rollouts of one prompt, with two methods of `concurrent.futures.Future`."""

    def done(self) -> bool:
        """Return whether `result` would return (or raise) without waiting."""
        ...

    def result(self) -> list[Rollout]:
        """Wait for the rollouts and return them. Raises RolloutError."""
        ...


class Generator(Protocol):
    """Source of rollouts for one trainer rank."""

    def submit(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> Sequence[RolloutFuture]:
        """Start generation with one spec per prompt. Raises RolloutError."""
        ...

    @property
    def no_live_workers(self) -> bool:
        """Return whether all workers are lost: futures then finish after the next weight sync."""
        ...

    @property
    def needs_weights(self) -> bool:
        """True when a weight sync must come before the next `submit`; the same on every rank."""
        ...


class WeightSync(Protocol):
    """Transfer of the trainer's weights to the engines of all ranks."""

    def sync(self, version: int, min_workers: int) -> bool:
        """Send the weights as `version` and return True if at least one engine holds them.

        Every rank calls this method. Raises RolloutError on every rank.
        """
        ...


class WeightReceiver(Protocol):
    """Receiving end of a weight sync in the trainer's own process."""

    def begin_sync(self) -> None:
        """Invalidate the current weights; generation stops until `commit`."""
        ...

    def push(self, tensors: NamedTensors) -> None:
        """Load one bucket of whole modules. The tensors may be reused after the call."""
        ...

    def commit(self, version: int) -> None:
        """Check that every tensor arrived, drop stale caches and generate as `version`."""
        ...


class InferenceEngine(Protocol):
    """One inference engine. `rollout/vllm/engine.py` documents the methods."""

    dtype: torch.dtype
    banned_token_ids: tuple[int, ...]
    version: int | None  # of the weights; None before the first sync, during a sync, and asleep
    in_process: bool  # True: the model lives in this process and can read its tensors

    @property
    def device(self) -> torch.device: ...
    @property
    def busy(self) -> bool: ...

    def generate(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[list[Rollout]]: ...
    def generate_each(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> list[list[Rollout]]: ...
    def submit(self, key: str, request: RolloutRequest, spec: SamplingSpec) -> None: ...
    def step(self) -> dict[str, list[Rollout]]: ...
    def abort(self, keys: Sequence[str]) -> None: ...

    def push_weights(self, named_tensors: NamedTensors, version: int) -> None: ...
    def start_update(self) -> None: ...
    def load(self, weights: NamedTensors | WeightBucket) -> None: ...
    def finish_update(self, version: int) -> None: ...
    def weights_checksum(self) -> Checksums: ...

    def sleep(self) -> None: ...
