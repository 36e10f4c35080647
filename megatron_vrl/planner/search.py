"""Other layouts of a config for the same GPUs: all that fit by their speed, and the nearest.

Tried are tensor, context and pipeline ranks within Megatron's rules, virtual stages, the cut of the
layers, and recompute; sequence parallelism goes with tensor parallelism, which only ever saves. The
nearest layout may also halve `batch.tokens`, move the engine or give up FP8, and changes as few
keys as it can.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any

from megatron_vrl.config import RunConfig
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.planner.plan import Plan, Question, make_plan, plan_memory, refusals

RECOMPUTE = ("none", "selective", "full")
VIRTUAL = (1, 2, 4)
ENGINE_RANKS = (1, 2, 4, 8)
SHARES = (0.5, 0.4, 0.3, 0.2)
MOST_TIMES = 64  # as many GPUs, at most, that are tried when none of the asked number fits

Changes = dict[str, Any]  # "section.key" -> value


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    changes: Changes  # to the config
    cfg: RunConfig
    gpus: int
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={_yaml(value)}" for key, value in self.changes.items()]


def ranked(cfg: RunConfig, arch: Architecture, asked: Question) -> tuple[list[Found], int]:
    """Layouts that fit, the fastest first, and how many were tried."""
    tried = [
        made | {"model.recompute": kind}
        for made, kind in product(_layouts(cfg, arch, asked), RECOMPUTE)
    ]
    found = [f for changes in tried if (f := _fitting(cfg, arch, asked, changes)) is not None]
    return sorted(found, key=lambda f: (f.plan.seconds, f.plan.memory.most)), len(tried)


def nearest(cfg: RunConfig, arch: Architecture, asked: Question) -> Found | None:
    """The layout that fits with the fewest changes, the fastest of those; if none does on so many
    GPUs, on the next multiple that has one."""
    times = 1
    while times <= MOST_TIMES:
        if found := _nearest(cfg, arch, replace(asked, gpus=asked.gpus * times)):
            return found
        times *= 2
    return None


def _nearest(cfg: RunConfig, arch: Architecture, asked: Question) -> Found | None:
    variants = [
        {**layout, **recompute, **batch, **engine, **fp8}
        for layout, recompute, batch, engine, fp8 in product(
            _layouts(cfg, arch, asked),
            [{"model.recompute": kind} for kind in RECOMPUTE],
            _budgets(cfg),
            _engines(cfg),
            [{"model.fp8": kind} for kind in dict.fromkeys((cfg.model.fp8, "none"))],
        )
    ]
    needed = [{k: v for k, v in each.items() if v != _value(cfg, k)} for each in variants]
    for _, members in groupby(sorted(needed, key=_cost), key=_cost):
        fits = [f for each in members if (f := _fitting(cfg, arch, asked, each)) is not None]
        if fits:
            return min(fits, key=lambda f: (f.plan.seconds, len(f.changes)))
    return None


def _cost(changes: Changes) -> float:
    """Of changing keys: those that follow from another are free."""
    free = {"parallel.sequence", "parallel.split", "parallel.layers_per_chunk"}
    return sum(key not in free for key in changes)


def _layouts(cfg: RunConfig, arch: Architecture, asked: Question) -> Iterator[Changes]:
    for tensor, context, pipeline, virtual in product(
        _divisors(arch.kv_heads), (1, 2, 4, 8), _divisors(asked.gpus), VIRTUAL
    ):
        rest, odd = divmod(asked.gpus, tensor * context * pipeline)
        chunks = pipeline * virtual
        if odd or not rest or tensor * context > asked.gpu.per_node:
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


def _budgets(cfg: RunConfig) -> list[Changes]:
    """Fewer tokens in a micro-batch, down to what a single prompt may have."""
    tokens = [cfg.batch.tokens]
    while tokens[-1] // 2 >= cfg.data.max_prompt_tokens:
        tokens.append(tokens[-1] // 2)
    return [{"batch.tokens": each} for each in tokens]


def _engines(cfg: RunConfig) -> list[Changes]:
    rollout = cfg.rollout
    if rollout.placement == "workers":
        ranks = sorted({rollout.tensor, *ENGINE_RANKS})
        return [{"rollout.tensor": t} for t in ranks if t >= rollout.tensor]
    shares = sorted({rollout.gpu_memory_utilization, *SHARES})
    own: list[Changes] = [{"rollout.gpu_memory_utilization": share} for share in shares]
    return own + [{"rollout.placement": "workers", "rollout.tensor": t} for t in ENGINE_RANKS]


def _fitting(cfg: RunConfig, arch: Architecture, asked: Question, changes: Changes) -> Found | None:
    changed = {key: value for key, value in changes.items() if value != _value(cfg, key)}
    candidate = _with(cfg, changed)
    if refusals(candidate, arch, asked.gpu, asked.gpus):
        return None
    memory = plan_memory(candidate, arch, asked)
    if memory.most > memory.usable or memory.engine.kv_cache < memory.engine.longest:
        return None
    plan = make_plan(candidate, arch, asked)
    return Found(changes=changed, cfg=candidate, gpus=asked.gpus, plan=plan)


def _value(cfg: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(cfg, section), name)


def _with(cfg: RunConfig, changes: Changes) -> RunConfig:
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
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
