"""Numbers that each rank holds, from the table of parameters that conversion and export use.

Exact: a copy on every tensor rank counts whole (norms, the vision tower), a cut parameter by its
part, a vocabulary with the rows that pad it, and a tied head once more on a last stage that lacks
the embedding.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import Architecture, padded_vocab
from megatron_vrl.models.pipeline_split import Chunk, stage_chunks, whole
from megatron_vrl.models.qwen2_5_vl.hf_shapes import hf_shapes
from megatron_vrl.models.qwen2_5_vl.weight_map import EMBEDDING, HEAD, Row, chunk_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Parameters by what they belong to."""

    vision: int = 0  # tower without its merger
    merger: int = 0
    embedding: int = 0
    matrices: int = 0  # of the language layers
    vectors: int = 0  # their norms and biases, and the final norm
    head: int = 0  # 0 where it is the embedding

    @property
    def all(self) -> int:
        return self.language + self.vision + self.merger

    @property
    def language(self) -> int:
        return self.embedding + self.matrices + self.vectors + self.head

    def trained(self, cfg: Model) -> int:
        """Those that get a gradient."""
        return (
            self.vision * (not cfg.freeze_vision)
            + self.merger * (not cfg.freeze_merger)
            + self.language * (not cfg.freeze_language)
        )


def count_all(arch: Architecture) -> Numbers:
    """Of the published model, each number once."""
    return _count(arch, whole(arch), 1, arch.vocab, exported_only=True)


def count_stage(arch: Architecture, model: Model, cfg: Parallel, stage: int) -> Numbers:
    """What one rank of a pipeline stage holds."""
    rows = padded_vocab(arch, cfg)
    counts = [
        _count(arch, chunk, cfg.tensor, rows, exported_only=False)
        for chunk in stage_chunks(arch, model, cfg, stage)
    ]
    return sum_of(counts)


def sum_of(counts: list[Numbers]) -> Numbers:
    return Numbers(
        **{name: sum(getattr(c, name) for c in counts) for name in Numbers.__dataclass_fields__}
    )


@cache
def _count(
    arch: Architecture, chunk: Chunk, tensor: int, vocab: int, exported_only: bool
) -> Numbers:
    shapes = _shapes(arch)
    totals = dict.fromkeys(Numbers.__dataclass_fields__, 0)
    for row in chunk_rows(arch, chunk):
        if exported_only and not row.exported:
            continue
        size = sum(prod(shapes[name]) for name in row.published)
        if row.layout.rows is not None:
            size = size // row.layout.rows * vocab
        totals[_part(row)] += size if row.layout.axis is None else size // tensor
    return Numbers(**totals)


@cache
def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    return hf_shapes(arch)


def _part(row: Row) -> str:
    if row.megatron.startswith("vision."):
        return "merger" if row.megatron.startswith("vision.merger.") else "vision"
    if row.megatron in (EMBEDDING, HEAD):
        return "embedding" if row.megatron == EMBEDDING else "head"
    is_vector = "layernorm" in row.megatron or row.megatron.endswith(".bias")
    return "vectors" if is_vector else "matrices"
