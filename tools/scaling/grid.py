"""What a study runs: sizes x layouts x strong and weak scaling, as cells with names."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from megatron_vrl.config import Parallel
from megatron_vrl.config.base import SECTION, Positive
from megatron_vrl.config.loader import overridden, read_tree
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
    """Name -> options of tools/make_tiny_model.py, or the path of a published checkpoint or of the
    JSON of an architecture, whose weights are then random."""
    layouts: list[Layout] = [Layout(), Layout(data=2), Layout(tensor=2), Layout(pipeline=2)]
    modes: list[Mode] = ["strong", "weak"]


class Work(_Section):
    """Of an update: prompts with a video each, and their answers."""

    prompts: Positive = 4
    """strong: of all ranks together; weak: of each rank."""
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
    """Updates whose median counts, after one that warms up."""
    profiled: Positive = 1
    """Updates after them, under torch.profiler."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest that a cell may take, model building included."""


class Simulate(_Section):
    configs: list[str] = []
    """Configs of runs to extrapolate, besides the sizes of the grid on this study's machine."""
    gpu: str = "h100"
    """Their GPU: a row of the planner's table, or the .json of a measured machine."""
    mfu: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak; 0: what the one-rank cell of `size` reached on this study's machine."""
    source: str = ""
    """Where `mfu` was measured, in words."""
    size: str = ""
    """Size of the grid that `mfu` 0 is taken from; needed then."""
    gpus: list[Positive] = [2**k for k in range(11)]
    prompts: Positive = 1024
    """strong: of a step, over all GPUs."""
    prompts_per_replica: Positive = 4
    """weak."""


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
        """All that its numbers depend on; a finished cell with another spec is run again."""
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
    """Raises ConfigError in one sentence."""
    tree = read_tree(path) if path else {}
    study = overridden(Study, tree, overrides, str(path or "options"))
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
    """Fewest ranks first, so that what others are compared with comes before them."""
    for layout in sorted(study.grid.layouts, key=lambda layout: layout.ranks):
        for size in study.grid.sizes:
            for mode in study.grid.modes:
                times = layout.ranks if mode == "weak" else 1
                prompts = study.work.prompts * times
                yield Cell(mode=mode, size=size, layout=layout, prompts=prompts)


def micro_batches(cell: Cell) -> int:
    """Of one data rank: every prompt with its answers is one."""
    each = math.ceil(cell.prompts / cell.layout.data)
    if cell.layout.virtual > 1:
        each = math.ceil(each / cell.layout.pipeline) * cell.layout.pipeline
    return each


def ideal_bubble(cell: Cell) -> float:
    """Share of the passes in which a stage idles: (p - 1) / (v m + p - 1), arXiv 2104.04473."""
    idle = cell.layout.pipeline - 1
    return idle / (cell.layout.virtual * micro_batches(cell) + idle)
