"""Weight sync and generation for the training loop; all trainer ranks act together."""

import time
from collections.abc import Sequence

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.parallel.mesh import Mesh, gather_objects, raise_on_all_ranks, world_axis
from megatron_vrl.rollout.interfaces import Generator, RolloutFuture, WeightSync
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.weight_sync import WeightVerifier
from megatron_vrl.types import Prompt, Rollout

POLL_INTERVAL_S = 0.005  # between two polls of pending futures; decoding one token takes longer
SYNC_RETRY_INTERVAL_S = 0.5


class RolloutManager:
    """Facade over generator and weight sync. Every rank calls every method, in the same order."""

    def __init__(
        self,
        cfg: config.RolloutConfig,
        mesh: Mesh,
        generator: Generator,
        weight_sync: WeightSync,
        verifier: WeightVerifier | None,
        banned_token_ids: tuple[int, ...],
    ) -> None:
        """`verifier`: compares weight checksums; None: they are not compared."""
        self.banned_token_ids = banned_token_ids  # tokens that no rollout contains
        self.version: int | None = None  # of the weights that the engines hold
        self._cfg, self._mesh = cfg, mesh
        self._generator, self._weight_sync, self._verifier = generator, weight_sync, verifier
        self._syncs = 0

    def sync_weights(self, version: int) -> None:
        """Send the trainer's weights to the engines, unless they already hold `version`.

        The first sync waits for `rollout.min_workers` workers, a later one for a single worker.
        Weight checksums are compared at the first sync and at every
        `rollout.check_weights_every`-th one.
        """
        if self.version == version:
            return
        self._sync_until_loaded(version, self._cfg.min_workers if self.version is None else 1)
        if self._verifier is not None:
            if self._syncs % self._cfg.check_weights_every == 0:
                self._verifier.check()
            self._syncs += 1

    def generate(
        self,
        prompts: Sequence[Prompt],
        spec: SamplingSpec,
        indices: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """Return `spec.n` rollouts for each of this rank's prompts, in order.

        `indices`: see `submit`; None: 0, 1, 2, ...
        Raises RolloutError on every rank if a prompt of any rank cannot be answered.
        """
        futures = self.submit(prompts, spec, range(len(prompts)) if indices is None else indices)
        self.wait(futures, required=len(futures), count=len(futures))
        return self.results(futures)

    def submit(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, indices: Sequence[int]
    ) -> Sequence[RolloutFuture]:
        """Start generation and return one future per prompt.

        Prompt i is sampled with the seed of `spec.for_prompt(indices[i])`. See `submit_each`.
        """
        return self.submit_each(prompts, [spec.for_prompt(index) for index in indices])

    def submit_each(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> Sequence[RolloutFuture]:
        """Start generation with one spec per prompt and return one future per prompt.

        Workers generate while the trainer does other work. An in-process engine finishes before the
        call returns. Engines that lost their weights get the trainer's first, which must be those
        of `version`.
        """
        if self.version is not None and self._generator.needs_weights:
            self._sync_until_loaded(self.version, 1)
        with raise_on_all_ranks(self._mesh):
            return self._generator.submit(prompts, specs)

    def wait(self, futures: Sequence[RolloutFuture], required: int, count: int) -> list[int]:
        """Wait for `count` of this rank's futures and return their indices.

        The first `required` futures are always among them. The remaining indices are those that
        finished first. Example: required=1, count=3 and futures 0, 2, 4, 5 done -> [0, 2, 4].

        When no live worker is left on some rank, the weights are synced again, and the workers that
        load them get the pending requests.
        """
        while True:
            chosen = self._poll(futures, required, count)
            if not any(gather_objects(world_axis(self._mesh), chosen is None)):
                assert chosen is not None
                return chosen
            assert self.version is not None
            self._sync_until_loaded(self.version, 1)

    def results(self, futures: Sequence[RolloutFuture]) -> list[list[Rollout]]:
        """Return the rollouts of finished futures. Raises RolloutError on every rank alike."""
        with raise_on_all_ranks(self._mesh):
            return [future.result() for future in futures]

    def _poll(
        self, futures: Sequence[RolloutFuture], required: int, count: int
    ) -> list[int] | None:
        """Return the indices that `wait` returns, or None when no live worker is left."""
        while True:
            done = [index for index, future in enumerate(futures) if future.done()]
            chosen = (done[:required] + [i for i in done if i >= required])[:count]
            if len(chosen) == count and all(future.done() for future in futures[:required]):
                return chosen
            if self._generator.no_live_workers:
                return None
            time.sleep(POLL_INTERVAL_S)

    def _sync_until_loaded(self, version: int, min_workers: int) -> None:
        """Repeat the weight sync until at least one engine holds `version`.

        Raises RolloutError on every rank after `rollout.worker_wait_timeout_s`.
        """
        deadline = time.monotonic() + self._cfg.worker_wait_timeout_s
        while not self._weight_sync.sync(version, min_workers):
            if gather_objects(world_axis(self._mesh), time.monotonic() > deadline)[0]:
                raise RolloutError(
                    "No rollout worker loaded the weights within rollout.worker_wait_timeout_s="
                    f"{self._cfg.worker_wait_timeout_s:g}: look at the workers' output."
                )
            time.sleep(SYNC_RETRY_INTERVAL_S)
        self.version = version
