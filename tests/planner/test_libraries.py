"""GPU memory that the planner counts for libraries and other processes."""

import pytest

from megatron_vrl.config import Parallel, RunConfig, load_config
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.planner import libraries
from megatron_vrl.planner.hardware import GIB, find_gpu
from megatron_vrl.planner.libraries import NCCL_GROUP, first_gpu_bytes, nccl_bytes
from megatron_vrl.planner.plan import Plan, PlanRequest, make_plan
from megatron_vrl.planner.search import nearest_layout
from megatron_vrl.video.dali import MAX_BATCH_BYTES
from tests.running import ROOT


@pytest.mark.parametrize(
    ("layout", "dp_ranks", "groups"),
    [
        ({}, 1, 0),  # one GPU has nobody to talk to
        ({}, 8, 3),
        ({"tensor": 2, "pipeline": 2}, 2, 8),
        ({"context": 2}, 2, 5),
    ],
)
def test_a_rank_has_a_communicator_for_each_group(
    layout: dict[str, int], dp_ranks: int, groups: int
) -> None:
    assert nccl_bytes(Parallel.model_validate(layout), dp_ranks) == groups * NCCL_GROUP


def planned(name: str, *overrides: str) -> tuple[RunConfig, Architecture, Plan]:
    cfg = load_config(ROOT / "configs" / f"{name}.yaml", list(overrides))
    arch = read_architecture(ROOT / cfg.model.architecture)
    request = PlanRequest(gpu=find_gpu("h100"), gpus=cfg.parallel.processes)
    return cfg, arch, make_plan(cfg, arch, request)


def test_the_decoder_and_a_sleeping_engine_stay_during_an_update() -> None:
    assert libraries.DECODER_FRAMES == MAX_BATCH_BYTES
    _, _, on_gpu = planned("qwen2.5-vl-3b-1gpu")
    _, _, on_cpu = planned("qwen2.5-vl-3b-1gpu", "video.device=cpu")
    assert on_gpu.memory.stages[0].update - on_cpu.memory.stages[0].update == 2 * GIB
    assert on_gpu.memory.rollout(0) - on_cpu.memory.rollout(0) == 2 * GIB
    stage = on_gpu.memory.stages[0]
    assert stage.graphs == GIB and stage.update > stage.persistent + stage.graphs
    assert not on_gpu.refused


def test_a_weight_sync_must_fit_on_a_workers_first_gpu() -> None:
    name = "qwen2.5-vl-72b-tp8pp4-fp8"
    cfg, arch, plan = planned(name)
    embedding = 2 * arch.vocab * arch.hidden
    assert first_gpu_bytes(cfg, arch) == embedding + NCCL_GROUP + 8 * libraries.CUDA_CONTEXT
    assert [stage.buckets for stage in plan.memory.stages] == [
        2 * embedding,
        *2 * [2 * 2 * 2 * arch.mlp * arch.hidden],
        2 * embedding,
    ]
    assert not plan.refused
    cfg, arch, crowded = planned(name, "rollout.gpu_memory_utilization=0.9")
    (refusal,) = crowded.refused
    assert refusal.startswith("During a weight sync a worker's first GPU holds 78.6 GiB, more than")
    request = PlanRequest(gpu=find_gpu("h100"), gpus=cfg.parallel.processes)
    found = nearest_layout(cfg, arch, request)
    assert found is not None and found.changes == {"rollout.gpu_memory_utilization": 0.8}
    _, _, same_machine = planned(name, "rollout.transport=shared_memory")
    assert {stage.buckets for stage in same_machine.memory.stages} == {0}
