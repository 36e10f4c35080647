"""Planned memory compared with the memory of real updates on this machine.

`measured.py` runs the updates and does not use the planner. Weights, gradients and optimizer state
must be exact; saved activations and the peak must be within 10 %. docs/results/planner.md lists the
errors.
"""

import json
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Algorithm, Batch, Model, Parallel, Run, RunConfig
from megatron_vrl.models.activations import (
    Kernels,
    head_saved,
    language_layer,
    layers_recomputed,
    merger_saved,
    vision_layer,
)
from megatron_vrl.models.pipeline_split import stage_chunks
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.models.recompute import vision_level
from megatron_vrl.planner.memory import StageMemory, chunk_saved, in_flight, stage_memory
from megatron_vrl.planner.rank_sizes import rank_sizes
from megatron_vrl.planner.workload import GroupSizes, PackedBatch
from tests.planner.measured import ARCHITECTURES, measure
from tests.running import ENVIRONMENT, ROOT, python

WORKER = ROOT / "tests" / "planner" / "measured.py"
WITHIN = 0.10
ONE = {"size": "small", "grid": [4, 16, 16], "answers": [33] * 4, "groups": 1, "tokens": 4096}
BFLOAT16 = ONE | {"grid": [2, 12, 16]}  # slow on a CPU
LONG = ONE | {"grid": [2, 12, 16], "answers": [129] * 6}
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "selective"},
    {"recompute": "full", "recompute_num_layers": 1, "recompute_vision": "full"},
    {"recompute": "full", "recompute_vision": "full"},
)
FULL = KINDS[-1]
PART: dict[str, Any] = {"recompute": "full", "recompute_num_layers": 3}


def case(
    base: dict[str, Any] = ONE,
    *,
    parallel: dict[str, int] | None = None,
    layout: str = "shared",
    groups: int = 1,
    tokens: int = 4096,
    **model: Any,
) -> dict[str, Any]:
    model = {"dtype": "float32"} | model
    own = {"parallel": parallel or {}, "layout": layout, "groups": groups, "tokens": tokens}
    return base | own | {"model": model}


FAST = [
    case(attention="flash"),
    case(recompute="full", freeze_vision=True),
    case(ONE | {"size": "qwen3"}),
]
ALONE = [
    case(),
    *(case(LONG, attention="flash", **kind) for kind in KINDS[::3]),
    *(case(BFLOAT16, dtype="bfloat16", **kind) for kind in KINDS[::2]),
    *(case(LONG, **kind) for kind in KINDS),
    case(layout="plain"),
    case(LONG, groups=2, freeze_vision=True, freeze_merger=True),
    case(ONE | {"size": "large"}, groups=2),
    case(ONE | {"size": "large"}, groups=2, **FULL),
    case(ONE | {"size": "large"}, groups=2, recompute="full"),
    case(ONE | {"size": "large"}, groups=2, recompute_vision="full"),
    case(ONE | {"size": "large"}, groups=2, freeze_vision=True, **PART),
]
TWO_RANKS = [
    *(
        case(groups=2, parallel={"tensor": 2, "sequence": sequence}, **kind)
        for sequence, kind in product((False, True), KINDS)
    ),
    case(BFLOAT16, groups=2, parallel={"tensor": 2, "sequence": True}, dtype="bfloat16"),
    case(groups=4, tokens=512, parallel={"pipeline": 2}),
    case(groups=4, tokens=512, parallel={"pipeline": 2}, **FULL),
    case(groups=2, tokens=512, parallel={"pipeline": 2}, **KINDS[2]),
    case(groups=4, tokens=512, parallel={"pipeline": 2, "virtual": 2}),
    case(groups=2, parallel={"context": 2}),
    case(groups=2, parallel={"context": 2}, attention="flash"),
    case(BFLOAT16, groups=2, dtype="bfloat16"),  # data parallel: half of the optimizer's state each
    case(BFLOAT16, groups=2, parallel={"distributed_optimizer": False}, dtype="bfloat16"),
]


def measured(tmp_path: Path, cases: list[dict[str, Any]], ranks: int = 1) -> list[dict[str, Any]]:
    given, out = tmp_path / "cases.json", tmp_path / "out.json"
    given.write_text(json.dumps(cases))
    program = [str(WORKER), str(given), str(out)]
    if ranks > 1:
        torchrun = str(ROOT / "launch" / "torchrun.py")
        program = [torchrun, "--standalone", "--nproc-per-node", str(ranks), *program]
    run = subprocess.run(
        [python(), *program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(out.read_text())
    return results


def planned(case: dict[str, Any], ranks: int, row: dict[str, int]) -> tuple[StageMemory, int]:
    """Memory of the row's stage, and what is saved for backward passes at the most."""
    arch = ARCHITECTURES[case["size"]]
    cfg = RunConfig(
        run=Run(out_dir=""),
        model=Model(checkpoint="", **{"attention": "sdpa"} | case["model"]),
        parallel=Parallel(**case["parallel"]),
        batch=Batch(tokens=case["tokens"], layout=case["layout"]),
        algorithm=Algorithm(kl=0.0),
    )
    parallel, plain = cfg.parallel, case["layout"] == "plain"
    answers = case["answers"]
    size = GroupSizes(
        prompt=row["prompt"],
        response=answers[0],
        answers=1 if plain else len(answers),
        grid=tuple(case["grid"]),
        pixels=PIXELS,
    )
    replicas = ranks // (parallel.tensor * parallel.context * parallel.pipeline)
    groups = case["groups"] * (len(answers) if plain else 1) // replicas // row["micro_batches"]
    multiple = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    rows = -(-groups * size.rows // multiple) * multiple
    batch, kernels = PackedBatch(group=size, groups=groups, rows=rows), Kernels(on_gpu=False)
    sharers, stage = replicas * parallel.context, row["stage"]
    memory = stage_memory(cfg, arch, stage, sharers, [batch], row["micro_batches"], kernels)
    sizes = rank_sizes(cfg.model, parallel, batch)
    layer = language_layer(arch, cfg.model, parallel, sizes.rows, sizes.attention, kernels)
    head = 0  # it is gone when the first layer is computed again
    chunks = stage_chunks(arch, cfg.model, parallel, stage)
    if any(chunk.post_process for chunk in chunks):
        head = head_saved(arch, cfg.model, layer, sizes.targets)
    again = max(layers_recomputed(layer, cfg.model, len(chunk.layers)) for chunk in chunks)
    if (first := chunks[0]).pre_process and not cfg.model.freeze_vision:
        block = vision_layer(arch, cfg.model, sizes.patches, kernels)
        gone = chunk_saved(first, layer, cfg.model)
        gone += merger_saved(arch, cfg.model, block, sizes.vision_tokens)
        again = max(again, block.recomputed(vision_level(cfg.model)) - gone)
    return memory, memory.activations + memory.vision + max(head, again)


def compare(results: list[dict[str, Any]]) -> None:
    for result in results:
        for row in result["ranks"]:
            memory, saved = planned(result["case"], len(result["ranks"]), row)
            about = f"{result['case']} stage {row['stage']}"
            for name in ("weights", "gradients", "optimizer"):  # but for a buffer's alignment
                exact = pytest.approx(row[name], rel=1e-3)
                assert getattr(memory, name) == exact, f"{name} of {about}"
            within: dict[str, Any] = {"rel": WITHIN}
            assert saved == pytest.approx(row["saved"], **within), about
            passes = memory.inputs + memory.passes
            assert passes == pytest.approx(row["passes"], **within), about
            persistent = row["weights"] + row["gradients"] + row["optimizer"]
            assert memory.update == pytest.approx(persistent + row["allocated"], **within), about


@pytest.mark.slow
def test_an_update_allocates_what_is_planned() -> None:
    compare([measure(case) for case in FAST])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_one_rank_in_every_mode(tmp_path: Path) -> None:
    compare(measured(tmp_path, ALONE))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_two_ranks_in_every_layout(tmp_path: Path) -> None:
    compare(measured(tmp_path, TWO_RANKS, ranks=2))


def most(*arguments: int) -> list[int]:
    return [max(counts) for counts in zip(*in_flight(*arguments), strict=True)]


def test_micro_batches_in_flight() -> None:
    assert [most(stage, 4, 1, 16) for stage in range(4)] == [[4], [3], [2], [1]]
    assert most(0, 4, 1, 2) == [2]  # no more than there are
    # Megatron's warm-up of the interleaved schedule: 2 (p - rank - 1) + (v - 1) p chunks, one more
    assert max(map(sum, in_flight(0, 4, 2, 16))) == 2 * 3 + 4 + 1
    assert max(map(sum, in_flight(3, 4, 2, 16))) == 4 + 1
