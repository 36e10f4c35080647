"""Cells of a study: sizes x layouts x strong and weak scaling, as cells with names."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from megatron_vrl.config import Parallel
from megatron_vrl.config.base import SECTION, Positive
from megatron_vrl.config.loader import read_tree, validate_with_overrides
from megatron_vrl.errors import ConfigError

Mode = Literal["strong", "weak"]
Patches = Annotated[int, Field(gt=0, multiple_of=28)]


class _Section(BaseModel):
    model_config = SECTION


class Layout(_Section):
    data: Positive = 1
    tensor: Positive = 1
    pipeline: Positive = 1
    virtual: Positive = 1
    context: Positive = 1
    sequence: bool = False
    split: Literal["even", "balanced"] = "even"
    distributed_optimizer: bool = True
    overlap: bool = False

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def name(self) -> str:
        flags = {"v": self.virtual > 1, "s": self.sequence, "o": self.overlap}
        more = "".join(flag for flag, there in flags.items() if there)
        return f"d{self.data}t{self.tensor}p{self.pipeline}c{self.context}{more}"

    def parallel(self) -> Parallel:
        return Parallel(**self.model_dump(exclude={"data"}))


class Grid(_Section):
    sizes: dict[str, dict[str, int | float] | str] = {"tiny": {"layers": 4}}
    """Name -> options of tools/make_tiny_model.py, or a path: a Hugging Face checkpoint or the JSON
    of an architecture, which gets random weights."""
    layouts: list[Layout] = [Layout(), Layout(data=2), Layout(tensor=2), Layout(pipeline=2)]
    modes: list[Mode] = ["strong", "weak"]


class Work(_Section):
    """Content of one update: prompts with one video each, and answers."""

    prompts: Positive = 4
    """Prompts of all ranks together (strong) or of each rank (weak)."""
    answers: Positive = 4
    answer_tokens: Annotated[int, Field(ge=2)] = 32
    frames: Annotated[int, Field(gt=0, multiple_of=2)] = 8
    height: Patches = 56
    width: Patches = 56
    """Pixels, in multiples of 28."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: Literal["none", "selective", "full"] = "none"
    layers: Literal["megatron", "transformer_engine"] = "megatron"
    attention: Literal["auto", "sdpa", "flash", "transformer_engine"] = "auto"
    freeze_vision: bool = False


class Rounds(_Section):
    timed: Positive = 3
    """Updates that the median is taken over, after one warm-up update."""
    profiled: Positive = 1
    """Further updates, under torch.profiler."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time of a cell in seconds, including model building."""


class Simulate(_Section):
    configs: list[str] = []
    """Configs of runs to extrapolate, besides the sizes of the grid on this study's machine."""
    gpu: str = "h100"
    """GPU of these runs: a name in the planner's table, or the .json of a measured machine."""
    mfu: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of peak FLOP/s; 0: the value that the one-rank cell of `size` reached here."""
    source: str = ""
    """Place where `mfu` was measured, as text."""
    size: str = ""
    """Size of the grid that gives `mfu`; required if `mfu` is 0."""
    gpus: list[Positive] = [2**k for k in range(11)]
    prompts: Positive = 1024
    """Prompts of a step over all GPUs (strong)."""
    prompts_per_replica: Positive = 4
    """Prompts of a step for each replica (weak)."""


class Study(_Section):
    grid: Grid = Grid()
    work: Work = Work()
    rounds: Rounds = Rounds()
    simulate: Simulate = Simulate()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    mode: Mode
    size: str
    layout: Layout
    prompts: int  # over all ranks

    @property
    def name(self) -> str:
        return f"{self.mode}/{self.size}/{self.layout.name}"

    def spec(self, study: Study) -> dict[str, Any]:
        """Return all that the results depend on; a cell whose spec has changed runs again."""
        return {
            "mode": self.mode,
            "size": self.size,
            "model": study.grid.sizes[self.size],
            "layout": self.layout.model_dump(),
            "prompts": self.prompts,
            "work": study.work.model_dump(exclude={"prompts"}),
            "rounds": study.rounds.model_dump(exclude={"timeout_s"}),
        }


def read_study(path: Path | None, overrides: list[str]) -> Study:
    """Return the study of a file and overrides. Raise ConfigError for values that cannot work."""
    tree = read_tree(path) if path else {}
    study = validate_with_overrides(Study, tree, overrides, str(path or "options"))
    for key in ("sizes", "layouts", "modes"):
        if not getattr(study.grid, key):
            raise ConfigError(f"grid.{key} is empty: name at least one.")
    for name in study.grid.sizes:
        if not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
            raise ConfigError(f"grid.sizes has the name {name!r}: use letters, digits, - . _ only.")
    simulate = study.simulate
    if simulate.mfu and not simulate.source:
        raise ConfigError(
            f"simulate.mfu={simulate.mfu} without simulate.source: say where it was measured."
        )
    if simulate.configs and not simulate.mfu and simulate.size not in study.grid.sizes:
        raise ConfigError(
            f"simulate.size={simulate.size!r} is not a size of the grid: choose one of "
            f"{', '.join(study.grid.sizes)}, or give simulate.mfu with its source."
        )
    return study


def cells(study: Study) -> Iterator[Cell]:
    """Yield the cells, fewest ranks first: baselines come before the cells compared with them."""
    for layout in sorted(study.grid.layouts, key=lambda layout: layout.ranks):
        for size in study.grid.sizes:
            for mode in study.grid.modes:
                times = layout.ranks if mode == "weak" else 1
                prompts = study.work.prompts * times
                yield Cell(mode=mode, size=size, layout=layout, prompts=prompts)


def micro_batches(cell: Cell) -> int:
    """Return the micro-batches of one data rank: one for each prompt with its answers."""
    each = math.ceil(cell.prompts / cell.layout.data)
    if cell.layout.virtual > 1:
        each = math.ceil(each / cell.layout.pipeline) * cell.layout.pipeline
    return each


def ideal_bubble(cell: Cell) -> float:
    """Return the fraction of idle passes of a stage: (p - 1) / (v m + p - 1), arXiv 2104.04473."""
    idle = cell.layout.pipeline - 1
    return idle / (cell.layout.virtual * micro_batches(cell) + idle)
