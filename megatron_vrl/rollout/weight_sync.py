"""Weight sync: the trainer's weights into every healthy inference engine.

`WeightExport` yields buckets of whole modules under HF names. An in-process engine gets the full
model from its own rank. Workers get each pipeline stage's layers from that stage. A sync ends with
a commit of the version number; rollouts carry the version of the weights that generated them.

A bucket is a collective over tensor-parallel ranks. Every rank therefore consumes every bucket to
its end, also after an error on this rank and on ranks that send nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch

from megatron_vrl.checkpoint.hf_export import NamedTensors, WeightExport
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.family import WeightMap
from megatron_vrl.parallel.mesh import Mesh, gather_objects, raise_on_all_ranks, world_axis
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.fp8_emulation import emulate_fp8
from megatron_vrl.rollout.interfaces import Checksums, WeightReceiver
from megatron_vrl.rollout.workers.pool import WorkerPool
from megatron_vrl.rollout.workers.worker_info import WorkerInfo

Transform = Callable[[NamedTensors], NamedTensors]  # applied to the tensors of a bucket


def transform_of(quantization: str, weights: WeightMap) -> Transform:
    """Return what happens to tensors before they are sent: emulated FP8, or nothing."""
    if quantization == "fp8_emulated":
        return partial(emulate_fp8, matrices=weights.language_matrices)
    return iter


class InProcessSync:
    """Weight sync with one engine in every trainer process. No worker can be lost here."""

    def __init__(
        self, mesh: Mesh, export: WeightExport, receiver: WeightReceiver, transform: Transform
    ) -> None:
        self._mesh, self._export = mesh, export
        self._receiver, self._transform = receiver, transform

    def sync(self, version: int, min_workers: int) -> bool:
        """Push the full model into this rank's engine and return True. Every rank calls it."""
        with raise_on_all_ranks(self._mesh):
            self._receiver.begin_sync()
        error = _push_buckets(
            self._export.buckets(), lambda bucket: self._receiver.push(self._transform(bucket))
        )
        _raise_together(self._mesh, error)
        with raise_on_all_ranks(self._mesh):
            self._receiver.commit(version)
        return True


class WorkerSync:
    """Weight sync with rollout workers.

    Rank 0 finds the workers, begins the sync and commits it. One rank of every pipeline stage
    sends that stage's layers. A worker that fails at any rank is left out until the next sync.
    """

    def __init__(
        self, mesh: Mesh, export: WeightExport, pool: WorkerPool, transform: Transform
    ) -> None:
        self._mesh, self._export = mesh, export
        self._pool, self._transform = pool, transform

    def sync(self, version: int, min_workers: int) -> bool:
        """Send the weights and return True if at least one worker took them.

        Every rank calls it. min_workers: rank 0 waits for so many reachable workers.
        """
        workers = self._wait_for_workers(min_workers)
        self._on_first_rank(lambda: self._pool.begin_sync(workers))
        self._send_stages(workers)
        self._on_first_rank(lambda: self._pool.commit(workers, version))
        return self._activate_successful(workers, version)

    def _wait_for_workers(self, min_workers: int) -> list[WorkerInfo]:
        """Return the reachable workers, the same list on every rank."""
        workers: list[WorkerInfo] = []
        with raise_on_all_ranks(self._mesh):
            if self._mesh.rank == 0:
                workers = self._pool.wait_ready(min_workers)
        everywhere: list[list[WorkerInfo]] = gather_objects(world_axis(self._mesh), workers)
        return everywhere[0]

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        with raise_on_all_ranks(self._mesh):
            if self._mesh.rank == 0:
                action()

    def _send_stages(self, workers: Sequence[WorkerInfo]) -> None:
        """Send every pipeline stage's layers, one stage after another if a transport needs it."""
        pipeline = self._mesh.pipeline
        with raise_on_all_ranks(self._mesh):
            own = self._pool.serialize_stages(workers)
        serialize = any(gather_objects(world_axis(self._mesh), own))
        error = None
        for turn in range(pipeline.size if serialize else 1):
            if not serialize or turn == pipeline.rank:
                error = self._send_own_stage(workers)
            _raise_together(self._mesh, error)

    def _send_own_stage(self, workers: Sequence[WorkerInfo]) -> RolloutError | None:
        def push(bucket: NamedTensors) -> None:
            if self._export.leads:
                self._pool.push(workers, self._transform(bucket))

        error = _push_buckets(self._export.own_buckets(), push)
        if error is None and self._export.leads:
            try:
                self._pool.flush()
            except RolloutError as caught:
                error = caught
        return error

    def _activate_successful(self, workers: Sequence[WorkerInfo], version: int) -> bool:
        """Admit the workers that failed on no rank to generation."""
        failed = set().union(*gather_objects(world_axis(self._mesh), self._pool.failed))
        successful = [worker for worker in workers if worker.address not in failed]
        self._pool.activate(successful, version)
        return bool(successful)


class WeightVerifier:
    """Comparison of the engines' live weights with the trainer's, bit for bit."""

    def __init__(
        self,
        mesh: Mesh,
        export: WeightExport,
        transform: Transform,
        dtype: torch.dtype,
        engine_checksums: Callable[[], dict[str, Checksums]],
    ) -> None:
        """dtype: the engines'. engine_checksums: checksums by engine, of those that this rank
        has to verify."""
        self._mesh, self._export, self._transform = mesh, export, transform
        self._dtype, self._engine_checksums = dtype, engine_checksums

    def check(self) -> None:
        """Raise RolloutError on every rank if an engine holds other weights than the trainer."""
        expected = tensor_checksums(self._transform(self._export.tensors()), self._dtype)
        with raise_on_all_ranks(self._mesh):
            for engine, sums in self._engine_checksums().items():
                wrong = sorted(name for name in expected if sums.get(name) != expected[name])
                if wrong:
                    raise RolloutError(
                        f"After a weight sync the engine of {engine} (rank {self._mesh.rank}) "
                        f"differs from the trainer in {len(wrong)} tensors, first {wrong[0]}: "
                        "check the vllm version."
                    )


def _push_buckets(
    buckets: Iterable[NamedTensors], push: Callable[[NamedTensors], None]
) -> RolloutError | None:
    """Push every bucket until one fails, exhaust all of them and return the error."""
    error = None
    for bucket in buckets:
        try:
            if error is None:
                push(bucket)
        except RolloutError as caught:
            error = caught
        _exhaust(bucket)
    return error


def _exhaust(bucket: Iterator[object]) -> None:
    for _ in bucket:
        pass


def _raise_together(mesh: Mesh, error: RolloutError | None) -> None:
    with raise_on_all_ranks(mesh):
        if error is not None:
            raise error
