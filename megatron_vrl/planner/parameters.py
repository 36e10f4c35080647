"""Number of parameters on each rank, computed from the weight map.

The counts are exact. Unsharded parameters (norms, the vision tower) count whole on every tensor
rank, sharded ones by their shard, the vocabulary with its padding, and a tied head a second time on
a last stage without the embedding.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.adapters import adapted_linears, adapter_rows, adapter_shapes
from megatron_vrl.models.architecture import Architecture, padded_vocab
from megatron_vrl.models.chunk import Chunk, whole_model
from megatron_vrl.models.pipeline_split import stage_chunks
from megatron_vrl.models.weight_layouts import EMBEDDING, HEAD, Row
from megatron_vrl.models.weight_map import chunk_rows, hf_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Number of parameters by component."""

    vision: int = 0  # vision tower without the merger
    merger: int = 0
    embedding: int = 0
    matrices: int = 0  # weight matrices of the language layers
    vectors: int = 0  # norms and biases of the language layers, and the final norm
    head: int = 0  # 0 if tied to the embedding on the same rank
    adapters: int = 0  # of `model.lora`; in none of the other parts

    @property
    def all(self) -> int:
        """Return the number of all parameters."""
        return self.language + self.vision + self.merger + self.adapters

    @property
    def language(self) -> int:
        """Return the number of the language model's parameters without adapters."""
        return self.embedding + self.matrices + self.vectors + self.head

    def trained(self, cfg: Model) -> int:
        """Return the number of parameters that get a gradient."""
        if cfg.lora.rank:
            return self.adapters
        return (
            self.vision * (not cfg.freeze_vision)
            + self.merger * (not cfg.freeze_merger)
            + self.language * (not cfg.freeze_language)
        )


def count_all(arch: Architecture) -> ParameterCounts:
    """Return the counts of the whole model; each parameter counts once."""
    return _count(arch, whole_model(arch), 1, arch.vocab, exported_only=True)


def count_stage(arch: Architecture, model: Model, cfg: Parallel, stage: int) -> ParameterCounts:
    """Return the counts of one rank of a pipeline stage."""
    rows = padded_vocab(arch, cfg)
    chunks = stage_chunks(arch, model, cfg, stage)
    counts = [_count(arch, chunk, cfg.tensor, rows, exported_only=False) for chunk in chunks]
    held = sum(size for chunk in chunks for _, size in adapter_sizes(arch, model, cfg, chunk))
    return replace(add_counts(counts), adapters=held)


def add_counts(counts: list[ParameterCounts]) -> ParameterCounts:
    """Return the sum of `counts`."""
    return ParameterCounts(
        **{
            name: sum(getattr(c, name) for c in counts)
            for name in ParameterCounts.__dataclass_fields__
        }
    )


@cache
def _count(
    arch: Architecture, chunk: Chunk, tensor: int, vocab: int, exported_only: bool
) -> ParameterCounts:
    """Return the counts of one chunk on one of `tensor` tensor ranks."""
    totals = dict.fromkeys(ParameterCounts.__dataclass_fields__, 0)
    for row in chunk_rows(arch, chunk):
        if row.exported or not exported_only:
            totals[_part(row)] += _size(arch, row, tensor, vocab)
    return ParameterCounts(**totals)


def trained_sizes(
    arch: Architecture, model: Model, cfg: Parallel, chunk: Chunk
) -> list[tuple[str, int]]:
    """Return Megatron's name and the elements of every parameter of `chunk` that learns, on one
    rank, in model order."""
    if model.lora.rank:
        return adapter_sizes(arch, model, cfg, chunk)
    learns = {"vision": not model.freeze_vision, "merger": not model.freeze_merger}
    vocab = padded_vocab(arch, cfg)
    return [
        (row.megatron, _size(arch, row, cfg.tensor, vocab))
        for row in chunk_rows(arch, chunk)
        if learns.get(_part(row), not model.freeze_language)
    ]


def adapter_sizes(
    arch: Architecture, model: Model, cfg: Parallel, chunk: Chunk
) -> list[tuple[str, int]]:
    """Return the name and the elements of every factor of the adapters of `chunk`, on one rank."""
    shapes = adapter_shapes(arch, model.lora, chunk)
    return [
        (row.megatron, prod(shapes[row.hf_names[0]]) // (cfg.tensor if _is_split(row) else 1))
        for row in adapter_rows(arch, model.lora, chunk)
    ]


def adapted_widths(arch: Architecture, model: Model, chunk: Chunk) -> list[int]:
    """Return, for each column-parallel layer of `chunk` with adapters, the columns of x A'."""
    linears = adapted_linears(arch, model.lora, chunk)
    return [model.lora.rank * sum(each.targeted) for each in linears if each.kind == "column"]


def partial_adapters(arch: Architecture, model: Model, cfg: Parallel, chunk: Chunk) -> int:
    """Return the elements of a chunk's adapters whose gradients tensor ranks sum, on one rank.

    They are A of column-parallel layers with sequence parallelism, B of row-parallel layers, and
    both of a merger.
    """
    sums = {("column", "A"): cfg.sequence, ("row", "B"): True, ("whole", "A"): True}
    sums[("whole", "B")] = True
    kinds = {each.module: each.kind for each in adapted_linears(arch, model.lora, chunk)}
    total = 0
    for name, size in adapter_sizes(arch, model, cfg, chunk):
        module, _, factor = name.partition(".lora.")
        total += size * sums.get((kinds[module], factor[0]), False)
    return total


def count_adapters(arch: Architecture, model: Model) -> int:
    """Return the number of parameters of all adapters; each counts once."""
    shapes = adapter_shapes(arch, model.lora, whole_model(arch))
    return sum(prod(shape) for shape in shapes.values())


def _is_split(row: Row) -> bool:
    return row.layout.axis is not None


def _size(arch: Architecture, row: Row, tensor: int, vocab: int) -> int:
    """Return the elements of one parameter on one of `tensor` tensor ranks."""
    shapes = _shapes(arch)
    size = sum(prod(shapes[name]) for name in row.hf_names)
    if row.layout.rows is not None:
        size = size // row.layout.rows * vocab
    return size if row.layout.axis is None else size // tensor


@cache
def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return `hf_shapes(arch)`, cached."""
    return hf_shapes(arch)


def _part(row: Row) -> str:
    """Return the field of ParameterCounts that a parameter belongs to."""
    if row.megatron.startswith("vision."):
        return "merger" if row.megatron.startswith("vision.merger") else "vision"
    if row.megatron in (EMBEDDING, HEAD):
        return "embedding" if row.megatron == EMBEDDING else "head"
    is_vector = "layernorm" in row.megatron or row.megatron.endswith(".bias")
    return "vectors" if is_vector else "matrices"
