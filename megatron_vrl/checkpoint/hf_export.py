"""Stream of the policy's weights under Hugging Face names, in buckets of tensors.

Buckets are planned once. A bucket holds whole modules, because an engine may pack a layer as soon
as it has the weight and the bias. It has at most `max_bytes` unless one module is larger. A bucket
costs one all-gather over the tensor-parallel ranks and, if every pipeline stage wants the whole
model, one broadcast from its stage. Memory holds one gathered bucket at a time, never a stage.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vrl.config.rollout import BUCKET_BYTES
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.lora import MergedWeights
from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.models.weight_layouts import Row
from megatron_vrl.models.weight_map import chunk_rows, parameters_by_row
from megatron_vrl.parallel.mesh import gather_objects

NamedTensors = Iterator[tuple[str, Tensor]]
RowsOf = Callable[[Architecture, Chunk], Sequence[Row]]


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Contents of one bucket of one pipeline stage. Every stage knows the plans of all stages."""

    names: tuple[str, ...]  # HF names
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return sum(shape.numel() for shape in self.shapes) * self.dtype.itemsize


class WeightExport:
    """Exporter of one model. Each call streams the current weights."""

    def __init__(
        self,
        chunks: Sequence[VisionLanguageModel],
        dtype: torch.dtype | None = None,
        value: Callable[[Tensor], Tensor] | None = None,
        max_bytes: int = BUCKET_BYTES,
        rows_of: RowsOf = chunk_rows,
    ) -> None:
        """Plan the buckets. Every rank calls it.

        `dtype` None: the dtype of each parameter. `value` maps a parameter to the tensor to export,
        for example its gradient; None: the weight, merged with its adapter if it has one.
        `rows_of` returns the rows of a chunk that are exported.
        """
        self._chunks, self._dtype = chunks, dtype
        self._value = value or MergedWeights(chunks)
        self._mesh = chunks[0].mesh
        self._rows = [
            _bucket_rows(rows_of(model.arch, model.chunk), self._size_of(model), max_bytes)
            for model in chunks
        ]
        own = [
            [self._plan(model, rows) for rows in buckets]
            for model, buckets in zip(chunks, self._rows, strict=True)
        ]
        self._plans = gather_objects(self._mesh.pipeline, own)  # [stage][virtual stage][bucket]

    @property
    def bucket_bytes(self) -> int:
        """Size of the largest bucket of any stage, in bytes."""
        return max(int(b.num_bytes) for stage in self._plans for chunk in stage for b in chunk)

    @property
    def leads(self) -> bool:
        """True on the one rank of each pipeline stage that uses `own_buckets`."""
        mesh = self._mesh
        return mesh.tensor.rank == mesh.context.rank == mesh.data.rank == 0

    def buckets(self) -> Iterator[NamedTensors]:
        """Yield the buckets of the whole model on every rank.

        Every rank must exhaust the iterator and each bucket.
        """
        if self._mesh.pipeline.size == 1:
            yield from self._own_buckets()
            return
        for virtual, model in enumerate(self._chunks):
            for stage, of_stage in enumerate(self._plans):
                mine = stage == self._mesh.pipeline.rank
                for number, plan in enumerate(of_stage[virtual]):
                    own = self._gathered(model, self._rows[virtual][number]) if mine else None
                    yield self._broadcast(plan, stage, own)

    def own_buckets(self) -> Iterator[NamedTensors]:
        """Yield the buckets of this pipeline stage on the rank that `leads`.

        Every rank must exhaust the iterator and each bucket. Ranks that do not lead discard the
        tensors, and other replicas get no buckets.
        """
        if self._mesh.context.rank == self._mesh.data.rank == 0:
            yield from self._own_buckets()

    def tensors(self) -> NamedTensors:
        """Yield the tensors of `buckets` one by one."""
        for bucket in self.buckets():
            yield from bucket

    def _own_buckets(self) -> Iterator[NamedTensors]:
        for model, buckets in zip(self._chunks, self._rows, strict=True):
            for rows in buckets:
                yield self._gathered(model, rows)

    def _size_of(self, model: VisionLanguageModel) -> Callable[[Row], int]:
        """Return a function: row of the weight map -> exported size in bytes."""
        params, ranks = parameters_by_row(model), self._mesh.tensor.size

        def num_bytes(row: Row) -> int:
            param = params[row.megatron]
            itemsize = (self._dtype or param.dtype).itemsize
            return int(param.numel() * itemsize) * (1 if row.layout.axis is None else ranks)

        return num_bytes

    def _plan(self, model: VisionLanguageModel, rows: Sequence[Row]) -> BucketPlan:
        """Return the plan of one bucket, from shapes alone."""
        params = parameters_by_row(model)
        names: list[str] = []
        shapes: list[torch.Size] = []
        for row in rows:
            param = params[row.megatron]
            shards = [torch.empty_like(param, device="meta")] * self._mesh.tensor.size
            names += row.hf_names
            shapes += [part.shape for part in row.layout.part(row.layout.unshard(shards))]
        return BucketPlan(
            tuple(names), tuple(shapes), self._dtype or params[rows[0].megatron].dtype
        )

    @torch.no_grad()
    def _gathered(self, model: VisionLanguageModel, rows: Sequence[Row]) -> NamedTensors:
        """Yield the whole tensors of one bucket after an all-gather over tensor-parallel ranks."""
        params, tensor = parameters_by_row(model), self._mesh.tensor
        values = [self._value(params[row.megatron]) for row in rows]
        values = [value.to(self._dtype or value.dtype) for value in values]
        shards: list[Sequence[Tensor]] = [[value] for value in values]
        cut = [i for i, row in enumerate(rows) if row.layout.axis is not None]
        if tensor.size > 1 and cut:
            local = torch.cat([values[i].reshape(-1) for i in cut])
            whole = local.new_empty(tensor.size, len(local))
            dist.all_gather(list(whole), local, group=tensor.group)
            for i, part in zip(cut, whole.split([values[i].numel() for i in cut], 1), strict=True):
                shards[i] = [shard.view_as(values[i]) for shard in part]
        for row, of_row in zip(rows, shards, strict=True):
            parts = row.layout.part(row.layout.unshard(of_row))
            yield from zip(row.hf_names, parts, strict=True)

    def _broadcast(self, plan: BucketPlan, stage: int, own: NamedTensors | None) -> NamedTensors:
        """Yield one bucket on all stages. own: its tensors on its stage, None on the others."""
        group = self._mesh.pipeline.group
        sizes = [shape.numel() for shape in plan.shapes]
        if own is not None:
            flat = torch.cat([tensor.reshape(-1) for _, tensor in own])
        else:
            flat = torch.empty(sum(sizes), dtype=plan.dtype, device=self._mesh.device)
        dist.broadcast(flat, dist.get_global_rank(group, stage), group=group)
        for name, part, shape in zip(plan.names, flat.split(sizes), plan.shapes, strict=True):
            yield name, part.view(shape)


def _bucket_rows(
    rows: Sequence[Row], num_bytes: Callable[[Row], int], max_bytes: int
) -> list[list[Row]]:
    """Return the exported rows of a chunk of layers, in buckets of whole modules."""
    modules: dict[str, list[Row]] = {}
    for row in rows:
        if row.exported:
            modules.setdefault(row.megatron.rpartition(".")[0], []).append(row)
    buckets: list[list[Row]] = []
    room = 0
    for module in modules.values():
        size = sum(map(num_bytes, module))
        if size > room or not buckets:
            buckets.append([])
            room = max_bytes
        buckets[-1] += module
        room -= size
    return buckets
