"""Output of `mvrl plan`: text for the terminal, and values for `--json`."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import counted
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.recompute import recompute_label
from megatron_vrl.planner.generation import EngineMemory
from megatron_vrl.planner.hardware import GIB
from megatron_vrl.planner.memory import StageMemory
from megatron_vrl.planner.parameters import ParameterCounts, count_adapters, count_all
from megatron_vrl.planner.plan import Memory, Plan, PlanRequest, worker_gpus
from megatron_vrl.planner.search import Candidate

PARTS = tuple(StageMemory.__dataclass_fields__)
NAMES = {
    "optimizer": "optimizer shards",
    "fp8_weights": "FP8 copies of weights",
    "log_probs": "log-prob chunks",
    "working": "a layer's backward",
    "stepping": "optimizer's update",
    "inputs": "inputs of micro-batches",
    "messages": "buffers of messages",
    "vision": "vision tower, kept",
    "vision_outputs": "frozen tower's outputs",
    "activations": "activations, kept",
    "decoder": "video decoder's process",
    "nccl": "NCCL groups",
    "buckets": "weight-sync buckets",
    "graphs": "engine's CUDA graphs",
}
PIXEL_CACHE = GIB  # cache of decoded pixels of a vLLM engine, see `rollout/vllm/arguments.py`
COLUMNS = 80  # width of the output
TOP = 10  # number of layouts that a search prints


def values(cfg: RunConfig, arch: Architecture, request: PlanRequest, plan: Plan) -> dict[str, Any]:
    """Return the plan for `--json`. Bytes are per GPU; FLOPs and tokens are those of all GPUs."""
    return {
        **heading(cfg, arch, request),
        "replicas": plan.replicas,
        "micro_batches_per_update": plan.micro_batches,
        "groups_per_micro_batch": plan.batch.groups,
        "prompt_tokens": plan.sizes.prompt,
        "vision_tokens": plan.sizes.vision_tokens,
        "response_tokens": plan.sizes.response,
        "tokens_per_step": plan.tokens,
        "flops_per_step": plan.model_flops,
        "hardware_flops_per_step": plan.hardware_flops,
        "parameters_per_gpu": {str(i): counts.all for i, counts in enumerate(plan.stages)},
        "memory_bytes": {
            str(stage): _stage_values(plan.memory, stage) for stage in range(len(plan.stages))
        },
        "engine_bytes": _engine_values(plan.memory.engine),
        "host_memory_bytes": host_bytes(cfg, request, plan.memory),
        "usable_bytes": plan.memory.usable,
        "seconds_per_phase": {name: phase.seconds for name, phase in plan.phases.items()},
        "seconds_by_cause": {name: dict(phase.parts) for name, phase in plan.phases.items()},
        "bounds": {name: phase.bound for name, phase in plan.phases.items()},
        "seconds_per_step": plan.seconds,
        "refused": list(plan.refused),
    }


def heading(cfg: RunConfig, arch: Architecture, request: PlanRequest) -> dict[str, Any]:
    """Return the values for `--json` that exist also for a refused layout."""
    counts = count_all(arch)
    return {
        "gpu": request.gpu.name,
        "gpus": request.gpus,
        "worker_gpus": worker_gpus(cfg),
        "mfu": request.mfu,
        "parallel": cfg.parallel.model_dump(),
        "recompute": recompute_label(cfg.model),
        "parameters": counts.all,
        "parameters_by_part": {
            "language": counts.language,
            "vision": counts.vision,
            "merger": counts.merger,
        },
        "trained_parameters": _trained(cfg, arch, counts),
    }


def candidate_values(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate layout for `--json`."""
    return {
        "gpus": candidate.gpus,
        "worker_gpus": worker_gpus(candidate.cfg),
        "changes": candidate.changes,
        "overrides": candidate.overrides,
        "seconds_per_step": candidate.plan.seconds,
        "peak_bytes": candidate.plan.memory.most,
    }


def host_bytes(cfg: RunConfig, request: PlanRequest, memory: Memory) -> dict[str, int]:
    """Return the host memory of one node whose GPUs are all in use."""
    ranks = min(request.gpus, request.gpu.per_node)
    host = {
        "frame_store": ranks * cfg.video.store_mib * 2**20,
        "checkpoint_at_most": ranks * max(memory.checkpoint_host),
    }
    if memory.colocated:
        host["engine_pixel_cache"] = ranks * PIXEL_CACHE
    return host


def _stage_values(memory: Memory, stage: int) -> dict[str, int]:
    """Return the memory parts of one pipeline stage, and their peaks, in bytes."""
    parts = {name: getattr(memory.stages[stage], name) for name in PARTS}
    engine = memory.engine
    if memory.colocated:
        parts |= {"engine_weights": engine.weights, "engine_kv_cache": engine.kv_cache}
        parts["engine_working"] = engine.working
    totals = {
        "update_peak": memory.stages[stage].update,
        "checkpoint_peak": memory.stages[stage].checkpoint,
        "rollout_peak": memory.rollout(stage),
        "peak": memory.peak(stage),
    }
    return parts | totals


def _engine_values(engine: EngineMemory) -> dict[str, int]:
    """Return the memory of an engine by part."""
    return {
        "weights": engine.weights,
        "working": engine.working,
        "kv_cache": engine.kv_cache,
        "sync": engine.sync,
        "kv_per_answer": engine.sequence,
        "answers_at_a_time": engine.sequences,
    }


def format_plan(cfg: RunConfig, arch: Architecture, request: PlanRequest, plan: Plan) -> str:
    """Return the plan as lines of at most COLUMNS columns."""
    parallel = cfg.parallel
    sequence = " with sequence parallelism" if parallel.sequence else ""
    workers = f" and {worker_gpus(cfg)} of workers" if worker_gpus(cfg) else ""
    return "\n".join(
        [
            wrapped(
                f"{request.gpus} x {request.gpu.name}{workers} = "
                f"{counted(plan.replicas, 'replica')} of tensor {parallel.tensor}{sequence} x "
                f"context {parallel.context} x pipeline "
                f"{parallel.pipeline} x virtual {parallel.virtual}; recompute "
                f"{recompute_label(cfg.model)}"
            ),
            wrapped(_model(cfg, arch, count_all(arch))),
            *_step(cfg, plan),
            "",
            *_memory_table(plan, cfg),
            *_host(cfg, request, plan.memory),
            "",
            *_time_table(plan, request.mfu),
        ]
    )


def _trained(cfg: RunConfig, arch: Architecture, counts: ParameterCounts) -> int:
    """Return the number of trained parameters of the whole model."""
    return count_adapters(arch, cfg.model) if cfg.model.lora.rank else counts.trained(cfg.model)


def _model(cfg: RunConfig, arch: Architecture, counts: ParameterCounts) -> str:
    """Return a line about the model's parameters."""
    return (
        f"model: {counts.all:,} parameters: language {counts.language:,}, vision tower "
        f"{counts.vision:,}, merger {counts.merger:,}; trained {_trained(cfg, arch, counts):,}"
    )


def _step(cfg: RunConfig, plan: Plan) -> Iterable[str]:
    """Yield lines about the sizes of a step."""
    s = plan.sizes
    prompts = counted(cfg.rollout.prompts_per_step, "prompt")
    batches = "micro-batch" if plan.micro_batches == 1 else "micro-batches"
    yield wrapped(
        f"step: {prompts} of {s.prompt} tokens, {s.vision_tokens} of them video, "
        f"{counted(s.answers, 'answer')} of {s.response} each; {plan.micro_batches} {batches} of "
        f"{plan.batch.rows} rows a replica and update"
    )
    yield wrapped(
        f"      {plan.tokens:,} tokens, {plan.model_flops:.3g} model FLOPs, "
        f"{plan.hardware_flops:.3g} computed"
    )


def _memory_table(plan: Plan, cfg: RunConfig) -> Iterable[str]:
    """Yield the memory table: a row per part, a column per stage."""
    memory, stages = plan.memory, range(len(plan.stages))
    rows: list[tuple[str, Callable[[int], int]]] = [
        (NAMES.get(part, part), partial(_part, memory, part)) for part in PARTS
    ]
    rows.append(("an update, at most", lambda stage: memory.stages[stage].update))
    rows.append(("checkpoint, at most", lambda stage: memory.stages[stage].checkpoint))
    if memory.colocated:
        engine = memory.engine
        rows += [
            ("engine: weights", lambda _: engine.weights),
            ("engine: KV cache", lambda _: engine.kv_cache),
            ("engine: working", lambda _: engine.working),
            ("rollout, at most", memory.rollout),
        ]
    shown = list(stages) if len(stages) <= 6 else [0, 1, len(stages) // 2, len(stages) - 1]
    table = [["GiB on a GPU of stage", *map(str, shown)]]
    for name, of in rows:
        if any(of(stage) for stage in stages):
            table.append([name, *(f"{of(stage) / GIB:.2f}" for stage in shown)])
    yield from aligned(table)
    between = "; the stages between are like their neighbours" if len(shown) < len(stages) else ""
    yield wrapped(f"of {memory.usable / GIB:.1f} GiB that may be used{between}")
    if not memory.colocated:
        engine = memory.engine
        yield wrapped(
            f"a worker's GPU: weights {engine.weights / GIB:.1f}, working "
            f"{engine.working / GIB:.1f}, KV cache {engine.kv_cache / GIB:.1f} GiB for "
            f"{counted(engine.sequences, 'answer')}; a weight sync takes {engine.sync / GIB:.1f} "
            "GiB more on a worker's first"
        )


def _part(memory: Memory, name: str, stage: int) -> int:
    """Return one part of a stage's memory."""
    size: int = getattr(memory.stages[stage], name)
    return size


def _host(cfg: RunConfig, request: PlanRequest, memory: Memory) -> Iterable[str]:
    """Yield a line about host memory."""
    parts = host_bytes(cfg, request, memory)
    listed = ", ".join(f"{k.replace('_', ' ')} {v / GIB:.1f}" for k, v in parts.items())
    yield wrapped(f"host memory of a node, GiB: {listed}")


def _time_table(plan: Plan, mfu: float) -> Iterable[str]:
    """Yield the table of phases with seconds and bounds."""
    table = [["phase", "seconds", "bound by", "of it"]]
    for name, phase in plan.phases.items():
        parts = ", ".join(f"{cause} {s:.2f}" for cause, s in phase.parts.items() if s >= 0.005)
        table.append([name, f"{phase.seconds:.2f}", phase.bound, parts])
    table.append(["a step", f"{plan.seconds:.2f}", "", f"at mfu {mfu:g}; not measured on a GPU"])
    lines = list(aligned(table, words=(0, 2, 3)))
    causes = lines[0].index(table[0][3])
    yield from (wrapped(line, causes) for line in lines)


def format_nearest(near: dict[str, Any] | None) -> str:
    """Return a line about the nearest layout, given its `candidate_values`."""
    if near is None:
        return "nearest: no layout of this config fits on such GPUs, however many"
    peak, workers = near["peak_bytes"] / GIB, near["worker_gpus"]
    beside = f" and {counted(workers, 'GPU')} of workers" if workers else ""
    return wrapped(
        f"nearest: --gpus {near['gpus']} {' '.join(near['overrides'])}  "
        f"({counted(near['gpus'], 'GPU')}{beside}, {peak:.1f} GiB, "
        f"{near['seconds_per_step']:.1f} s a step)",
        9,
    )


def wrapped(line: str, indent: int = 6) -> str:
    """Return `line` wrapped to COLUMNS columns; following lines are indented."""
    return textwrap.fill(
        line,
        COLUMNS,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def search_table(candidates: Sequence[Candidate], tried: int) -> str:
    """Return a table of the first TOP candidates, which are sorted by seconds."""
    head = ["tensor", "context", "pipeline", "virtual", "split", "recompute", "GiB", "seconds"]
    table = [head]
    for each in candidates[:TOP]:
        parallel = each.cfg.parallel
        table.append(
            [
                str(parallel.tensor),
                str(parallel.context),
                str(parallel.pipeline),
                str(parallel.virtual),
                parallel.split,
                recompute_label(each.cfg.model),
                f"{each.plan.memory.most / GIB:.1f}",
                f"{each.plan.seconds:.1f}",
            ]
        )
    lines = [f"{len(candidates)} of {counted(tried, 'layout')} fit; by the seconds of a step:"]
    return "\n".join([*lines, *aligned(table)])


def aligned(table: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> Iterable[str]:
    """Yield the table's lines with aligned columns. Columns in `words` are aligned left, the others
    right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        cells = [
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
