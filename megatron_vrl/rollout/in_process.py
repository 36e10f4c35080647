"""Inference engine inside a trainer process (`rollout.placement: colocated`)."""

from collections.abc import Sequence
from concurrent.futures import Future

from megatron_vrl.rollout.buckets import NamedTensors
from megatron_vrl.rollout.interfaces import Checksums, InferenceEngine
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.types import Prompt, Rollout


class InProcessEngine:
    """Generator and WeightReceiver that use one engine of this process.

    `submit` returns finished futures. The engine sleeps afterwards, so that training can use the
    GPU memory. A sleeping engine on a GPU has lost its weights, and the next `submit` needs a
    weight sync. Pushing weights on one GPU is cheaper than moving them to host memory and back.

        begin_sync   memory for the weights is taken
        push         the weights arrive
        commit       memory for the KV cache is taken
        submit       rollouts are generated, and all of this memory is freed
    """

    no_live_workers = False

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    def submit(
        self, prompts: Sequence[Prompt], specs: Sequence[SamplingSpec]
    ) -> list[Future[list[Rollout]]]:
        """Generate all rollouts before returning. Raises RolloutError."""
        try:
            groups = self._engine.generate_each(prompts, specs)
        finally:
            self._engine.sleep()
        futures: list[Future[list[Rollout]]] = []
        for group in groups:
            futures.append(Future())
            futures[-1].set_result(group)
        return futures

    @property
    def needs_weights(self) -> bool:
        """True if the engine has no weights: before the first sync, and on a GPU after a sleep."""
        return self._engine.version is None

    def begin_sync(self) -> None:
        """Invalidate the engine's weights."""
        self._engine.start_update()

    def push(self, tensors: NamedTensors) -> None:
        """Load one bucket."""
        self._engine.load(tensors)

    def commit(self, version: int) -> None:
        """End the weight sync; the engine generates as `version`."""
        self._engine.finish_update(version)

    def checksums(self) -> dict[str, Checksums]:
        """Return {"this process": SHA-256 of every live weight}."""
        return {"this process": self._engine.weights_checksum()}
