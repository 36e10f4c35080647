"""Weight map of the adapters: the linear layers that have one, and its tensors as PEFT names them.

A linear layer of Megatron holds one matrix of Hugging Face (o_proj, down_proj, those of a merger),
two (gate_proj and up_proj) or three (q_proj, k_proj and v_proj). Each targeted matrix has factors A
[rank, input] and B [output, rank] of its own, as in PEFT. Tensor parallelism splits B of a
column-parallel layer and A of a row-parallel layer, each along the axis along which it splits the
matrix.

This module imports nothing of Megatron, because a dry run and the planner use it, too.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_vrl.config import Lora, Model
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import Shape, WeightMap
from megatron_vrl.models.weight_layouts import COPY, ROW, Layout, Row, only, qkv_layout
from megatron_vrl.models.weight_map import chunk_rows, hf_shapes

PEFT_PREFIX = "base_model.model."
FACTORS = ("A", "B")
COLUMN = Layout(only, lambda whole: [whole], axis=0)
_MERGER = re.compile(r"vision\.merger\..*(hidden|out)\.weight")  # of `Row.megatron`

Kind = Literal["column", "row", "whole"]  # split by output, by input, or on every tensor rank


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """A linear layer of Megatron with adapters."""

    row: Row  # of its weight
    kind: Kind
    targeted: tuple[bool, ...]  # for each matrix of Hugging Face in the weight

    @property
    def module(self) -> str:
        """Return the name of the layer in its chunk."""
        return self.row.megatron.removesuffix(".weight")

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the names of the matrices' factors inside the module: for example "q_proj"."""
        return tuple(name.removesuffix(".weight").split(".")[-1] for name in self.row.hf_names)


def check_lora(cfg: Model) -> None:
    """Raise ConfigError if `model.lora` contradicts other keys of the section."""
    lora = cfg.lora
    if not lora.rank:
        if lora.merger or lora.adapter:
            raise ConfigError("model.lora.rank=0 means no adapters: set model.lora.rank.")
        return
    if cfg.layers != "megatron":
        raise ConfigError(
            f"model.lora.rank={lora.rank} with model.layers={cfg.layers}: an adapter reads the "
            "input of its matrix product and adds to its partial sums, which only Megatron's "
            "layers show; set model.layers=megatron and model.fp8=none."
        )
    wanted = {
        "freeze_vision": True,
        "freeze_merger": not lora.merger,
        "freeze_language": False,
    }
    for key, value in wanted.items():
        if getattr(cfg, key) != value:
            raise ConfigError(
                f"model.{key}={str(not value).lower()} with model.lora.rank={lora.rank} and "
                f"model.lora.merger={str(lora.merger).lower()}: adapters are trained in the "
                "language model (with model.lora.merger in the merger, too), and nothing else is; "
                f"set model.{key}={str(value).lower()}."
            )


def is_adapter(name: str) -> bool:
    """Return whether a parameter, by its name in a chunk, is a factor of an adapter."""
    return ".lora." in name


def adapted_linears(arch: Architecture, cfg: Lora, chunk: Chunk) -> list[AdaptedLinear]:
    """Return the linear layers of a chunk that have adapters; [] if `cfg.rank` is 0."""
    if not cfg.rank:
        return []
    matrices = family_of(arch).weights.language_matrices
    found = []
    for row in chunk_rows(arch, chunk):
        if matrices.fullmatch(row.hf_names[0]):
            of = tuple(name.split(".")[-2] in cfg.target_names for name in row.hf_names)
        else:
            of = (cfg.merger and _MERGER.fullmatch(row.megatron) is not None,)
        if any(of):
            found.append(AdaptedLinear(row, _kind(row), of))
    return found


def _kind(row: Row) -> Kind:
    if row.layout.axis is None:
        return "whole"
    return "row" if row.layout is ROW else "column"


def adapter_rows(arch: Architecture, cfg: Lora, chunk: Chunk) -> list[Row]:
    """Return a row for each factor of a chunk's adapters, with its name in a PEFT adapter."""
    weights = family_of(arch).weights
    rows = []
    for linear in adapted_linears(arch, cfg, chunk):
        layouts = {
            "column": {"A": COPY, "B": COLUMN},
            "row": {"A": ROW, "B": COPY},
            "whole": {"A": COPY, "B": COPY},
        }[linear.kind]
        for key, name, used in zip(linear.keys, linear.row.hf_names, linear.targeted, strict=True):
            for factor in FACTORS if used else ():
                rows.append(
                    Row(
                        f"{linear.module}.lora.{factor}.{key}",
                        (factor_name(weights, name, factor),),
                        layouts[factor],
                    )
                )
    return rows


def adapter_shapes(arch: Architecture, cfg: Lora, chunk: Chunk) -> dict[str, Shape]:
    """Return the shape of each factor of a chunk's adapters, by its name in a PEFT adapter."""
    if not cfg.rank:
        return {}
    shapes = hf_shapes(arch)
    found: dict[str, Shape] = {}
    names = iter(row.hf_names[0] for row in adapter_rows(arch, cfg, chunk))
    for linear in adapted_linears(arch, cfg, chunk):
        for name, used in zip(linear.row.hf_names, linear.targeted, strict=True):
            if used:
                outputs, inputs = shapes[name]
                found[next(names)] = (cfg.rank, inputs)
                found[next(names)] = (outputs, cfg.rank)
    return found


def target_modules(cfg: Lora) -> str:
    """Return PEFT's `target_modules`: a regular expression for names of transformers' modules.

    A list of names would also match linear layers of the vision tower.
    """
    names = "|".join(cfg.target_names)
    language = rf"model\.language_model\.layers\.\d+\.(?:self_attn|mlp)\.(?:{names})"
    if not cfg.merger:
        return language
    mergers = r"model\.visual\.(?:merger|deepstack_merger_list\.\d+)\.(?:mlp\.[02]|linear_fc[12])"
    return f"{language}|{mergers}"


def joined_rows(
    arch: Architecture, linear: AdaptedLinear, ranks: int
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function that joins shards of the matrices in `linear` as Megatron stores them on
    one of `ranks` tensor ranks."""
    if len(linear.targeted) == 3:
        return qkv_layout(arch.heads // ranks, arch.kv_heads // ranks, fused=False).join
    return linear.row.layout.join


def factor_name(weights: WeightMap, name: str, factor: str) -> str:
    """Return the name in a PEFT adapter of factor "A" or "B" of the matrix `name`."""
    module = _transformers_name(weights, name).removesuffix(".weight")
    return f"{PEFT_PREFIX}{module}.lora_{factor}.weight"


def _transformers_name(weights: WeightMap, name: str) -> str:
    """Return the name in the memory of transformers of a tensor in released checkpoints."""
    for prefix, released in weights.released_prefixes.items():
        if prefix.startswith("model.") and name.startswith(released):
            return prefix + name.removeprefix(released)
    return name
