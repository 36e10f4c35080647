"""Search over layouts of a configuration: all layouts that fit, by speed, and the nearest one.

The search varies tensor, context and pipeline size within Megatron's rules, virtual stages and the
split of layers, and takes the fastest recompute of language model and tower that fits. Sequence
parallelism is on whenever tensor parallelism is, since it only saves memory. The nearest layout is
the layout that fits and changes the fewest keys. It may also halve `batch.tokens`, change the
engine's placement or memory, or turn off FP8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import ceil
from typing import Any

from megatron_vrl.config import RunConfig
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.planner.plan import Plan, PlanRequest, make_plan, plan_memory, refusals

FRACTIONS = (1 / 4, 1 / 2, 3 / 4)  # of a chunk's layers, recomputed in full
VIRTUAL = (1, 2, 4)
ENGINE_RANKS = (1, 2, 4, 8)
GPU_MEMORY_FRACTIONS = (0.5, 0.4, 0.3, 0.2)
WORKER_MEMORY_FRACTION = 0.8  # leaves room for a weight sync on a worker's first GPU
MOST_TIMES = 64  # largest multiple of the requested GPUs to try

Changes = dict[str, Any]  # "section.key" -> value


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout that fits, with its plan."""

    changes: Changes  # changes to the config
    cfg: RunConfig
    gpus: int
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """Return the changes as `section.key=value`."""
        return [f"{key}={_yaml(value)}" for key, value in self.changes.items()]


def rank_layouts(
    cfg: RunConfig, arch: Architecture, request: PlanRequest
) -> tuple[list[Candidate], int]:
    """Return the layouts that fit, fastest first, and the number of layouts tried."""
    layouts = list(_layouts(cfg, arch, request))
    found = [_fastest_recompute(cfg, arch, request, layout) for layout in layouts]
    return sorted((each for each in found if each), key=_speed), len(layouts)


def _fastest_recompute(
    cfg: RunConfig, arch: Architecture, request: PlanRequest, layout: Changes
) -> Candidate | None:
    """Return the layout with the fastest recompute that fits; None if none fits."""
    levels = _all_recompute(cfg, _layers_of_chunk(arch, layout))
    tried = (_plan_if_fits(cfg, arch, request, layout | level) for level in levels)
    return min((each for each in tried if each), key=_speed, default=None)


def _speed(candidate: Candidate) -> tuple[float, float, int]:
    """Return the sort key of a candidate: seconds of a step, of all its phases, and memory."""
    plan = candidate.plan
    phases = sum(phase.seconds for phase in plan.phases.values())
    return plan.seconds, phases, plan.memory.most


def nearest_layout(cfg: RunConfig, arch: Architecture, request: PlanRequest) -> Candidate | None:
    """Return the nearest layout, the fastest if several change as few keys; None if none fits.

    If no layout fits on the requested number of GPUs, twice as many are tried, then four times, and
    so on up to MOST_TIMES.
    """
    times = 1
    while times <= MOST_TIMES:
        if found := _nearest(cfg, arch, replace(request, gpus=request.gpus * times)):
            return found
        times *= 2
    return None


def _nearest(cfg: RunConfig, arch: Architecture, request: PlanRequest) -> Candidate | None:
    """Return the nearest layout on exactly `request.gpus` GPUs; None if none fits."""
    variants = [
        {**layout, **recompute, **batch, **engine, **fp8}
        for layout, recompute, batch, engine, fp8 in product(
            _layouts(cfg, arch, request),
            _more_recompute(cfg),
            _budgets(cfg),
            _engines(cfg),
            [{"model.fp8": kind} for kind in dict.fromkeys((cfg.model.fp8, "none"))],
        )
    ]
    needed = [{k: v for k, v in each.items() if v != _value(cfg, k)} for each in variants]
    for _, members in groupby(sorted(needed, key=_cost), key=_cost):
        fits = [f for each in members if (f := _plan_if_fits(cfg, arch, request, each)) is not None]
        if fits:
            # The plan does not count that smaller micro-batches use a GPU less well.
            return min(
                fits,
                key=lambda f: (f.plan.seconds, len(f.changes), "batch.tokens" in f.changes),
            )
    return None


def _cost(changes: Changes) -> float:
    """Return the number of changed keys, without keys that depend on another changed key."""
    free = {"parallel.sequence", "parallel.split", "parallel.layers_per_chunk"}
    return sum(key not in free for key in changes)


def _layouts(cfg: RunConfig, arch: Architecture, request: PlanRequest) -> Iterator[Changes]:
    """Yield the parallel layouts that Megatron's rules allow."""
    for tensor, context, pipeline, virtual in product(
        _divisors(arch.kv_heads), (1, 2, 4, 8), _divisors(request.gpus), VIRTUAL
    ):
        rest, odd = divmod(request.gpus, tensor * context * pipeline)
        chunks = pipeline * virtual
        if odd or not rest or tensor * context > request.gpu.per_node:
            continue
        if chunks > arch.layers or (virtual > 1 and pipeline == 1):
            continue
        for split in ("even", "balanced") if pipeline > 1 else ("even",):
            if split == "even" and arch.layers % chunks:
                continue
            yield {
                "parallel.tensor": tensor,
                "parallel.context": context,
                "parallel.pipeline": pipeline,
                "parallel.virtual": virtual,
                "parallel.split": split,
                "parallel.layers_per_chunk": [],
                "parallel.sequence": tensor > 1,
            }


def _layers_of_chunk(arch: Architecture, layout: Changes) -> int:
    """Return the layers of an average chunk of a layout, rounded up."""
    chunks: int = layout["parallel.pipeline"] * layout["parallel.virtual"]
    return -(-arch.layers // chunks)


def _all_recompute(cfg: RunConfig, layers: int) -> list[Changes]:
    """Return the levels of recompute to try for chunks of `layers` layers."""
    parts = sorted({ceil(layers * fraction) for fraction in FRACTIONS})
    levels = [("none", 0), ("selective", 0), *(("full", number) for number in parts), ("full", 0)]
    given = (cfg.model.recompute, cfg.model.recompute_num_layers)
    towers = [cfg.model.recompute_vision] if cfg.model.freeze_vision else ["none", "full"]
    return _levels([given, *levels], towers)


def _more_recompute(cfg: RunConfig) -> list[Changes]:
    """Return the given level of recompute, and levels that save more memory."""
    given = (cfg.model.recompute, cfg.model.recompute_num_layers)
    levels = [("selective", 0), ("full", 0)] if cfg.model.recompute == "none" else [("full", 0)]
    towers = [cfg.model.recompute_vision]
    return _levels([given, *levels], towers if cfg.model.freeze_vision else [*towers, "full"])


def _levels(language: Sequence[tuple[str, int]], towers: Sequence[str]) -> list[Changes]:
    """Return the changes for each level of the language model with each level of the tower."""
    return [
        {
            "model.recompute": level,
            "model.recompute_num_layers": number,
            "model.recompute_vision": tower,
        }
        for (level, number), tower in product(dict.fromkeys(language), dict.fromkeys(towers))
    ]


def _budgets(cfg: RunConfig) -> list[Changes]:
    """Return `batch.tokens`, its half, its quarter, ..., while a prompt of maximum length fits."""
    tokens = [cfg.batch.tokens]
    while tokens[-1] // 2 >= cfg.data.max_prompt_tokens:
        tokens.append(tokens[-1] // 2)
    return [{"batch.tokens": each} for each in tokens]


def _engines(cfg: RunConfig) -> list[Changes]:
    """Return the placements and sizes of the engine to try."""
    rollout = cfg.rollout
    if rollout.placement == "workers":
        ranks = sorted({rollout.tensor, *ENGINE_RANKS})
        shares = sorted({rollout.gpu_memory_utilization, WORKER_MEMORY_FRACTION})
        return [
            {"rollout.tensor": t, "rollout.gpu_memory_utilization": share}
            for t in ranks
            if t >= rollout.tensor
            for share in shares
        ]
    shares = sorted({rollout.gpu_memory_utilization, *GPU_MEMORY_FRACTIONS})
    own: list[Changes] = [{"rollout.gpu_memory_utilization": share} for share in shares]
    return own + [{"rollout.placement": "workers", "rollout.tensor": t} for t in ENGINE_RANKS]


def _plan_if_fits(
    cfg: RunConfig, arch: Architecture, request: PlanRequest, changes: Changes
) -> Candidate | None:
    """Return the configuration with `changes` as a candidate; None if it is refused or does not
    fit."""
    changed = {key: value for key, value in changes.items() if value != _value(cfg, key)}
    candidate = _with(cfg, changed)
    if refusals(candidate, arch, request.gpu, request.gpus):
        return None
    memory = plan_memory(candidate, arch, request)
    if not memory.fits:
        return None
    plan = make_plan(candidate, arch, request)
    return Candidate(changes=changed, cfg=candidate, gpus=request.gpus, plan=plan)


def _value(cfg: RunConfig, key: str) -> Any:
    """Return the value of `section.key` in `cfg`."""
    section, _, name = key.partition(".")
    return getattr(getattr(cfg, section), name)


def _with(cfg: RunConfig, changes: Changes) -> RunConfig:
    """Return `cfg` with `changes` applied."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    update = {
        section: getattr(cfg, section).model_copy(update=values)
        for section, values in sections.items()
    }
    return cfg.model_copy(update=update)


def _yaml(value: Any) -> str:
    """Return `value` as YAML for an override."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _divisors(number: int) -> list[int]:
    """Return all divisors of `number`, ascending."""
    return [k for k in range(1, number + 1) if number % k == 0]
