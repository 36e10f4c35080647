"""A colocated engine that sleeps as on a GPU, with vLLM itself and a stub of the device.

The stub stands for the memory: a sleeping engine's weights and KV cache are NaN, and every use of
memory that is not there fails. vLLM's CPU worker does nothing at these two calls.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_vrl import config
from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import RolloutError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.qwen2_5_vl.weight_map import WEIGHTS
from megatron_vrl.parallel.mesh import init_mesh
from megatron_vrl.policy.policy import Policy
from megatron_vrl.rollout.in_process import InProcessEngine
from megatron_vrl.rollout.manager import RolloutManager
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.rollout.weight_sync import InProcessSync, transform_of
from tests.rollout.conftest import MakePrompt, Weights

if TYPE_CHECKING:
    from vllm.v1.worker.cpu_worker import CPUWorker

pytestmark = pytest.mark.slow
SPEC = SamplingSpec(n=2, temperature=1.0, top_p=1.0, max_tokens=8, seed=5)
PUSH_AND_ANSWER = ["wake weights", "load", "wake kv_cache", "decode", "sleep 2"]


class Device:
    """Memory of a GPU by tag, as vLLM's allocator keeps it, with a list of what happened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from vllm.v1.worker.cpu_worker import CPUWorker

        self.resident = {"weights", "kv_cache"}
        self.events: list[str] = []
        patch.setattr(CPUWorker, "sleep", lambda worker, level: self.sleep(worker, level))
        patch.setattr(CPUWorker, "wake_up", lambda worker, tags: self.wake_up(worker, tags))
        self._watch(patch, CPUWorker, "update_weights", "load", {"weights"})
        self._watch(patch, CPUWorker, "execute_model", "decode", {"weights", "kv_cache"})

    def sleep(self, worker: "CPUWorker", level: int) -> None:
        self._say(f"sleep {level}")
        assert self.resident == {"weights", "kv_cache"}
        self.resident = set()
        for parameter in worker.model_runner.model.parameters():
            parameter.data.fill_(torch.nan)
        for cache in worker.model_runner.kv_caches:
            cache.fill_(torch.nan)

    def wake_up(self, worker: "CPUWorker", tags: list[str]) -> None:
        self._say(f"wake {' '.join(tags)}")
        assert self.resident.isdisjoint(tags)
        self.resident |= set(tags)
        for cache in worker.model_runner.kv_caches if "kv_cache" in tags else ():
            cache.zero_()

    def _watch(
        self,
        patch: pytest.MonkeyPatch,
        worker_class: "type[CPUWorker]",
        name: str,
        event: str,
        needed: set[str],
    ) -> None:
        method = getattr(worker_class, name)

        def watched(worker: "CPUWorker", *args: Any, **kwargs: Any) -> Any:
            self._say(event)
            assert needed <= self.resident
            return method(worker, *args, **kwargs)

        patch.setattr(worker_class, name, watched)

    def _say(self, event: str) -> None:
        if self.events[-1:] != [event]:  # several buckets, several tokens
            self.events.append(event)

    def told(self) -> list[str]:
        told, self.events = self.events, []
        return told


@pytest.fixture
def device(shared_engine: VllmEngine, weights: Weights) -> Iterator[Device]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_engine, "_on_gpu", True)
        yield Device(patch)
        shared_engine.push_weights(weights.items(), version=1)  # awake for the tests that follow


@pytest.fixture
def manager(
    shared_engine: VllmEngine, device: Device, checkpoint: Path
) -> Iterator[RolloutManager]:
    mesh = init_mesh(Parallel(), seed=1)
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    engine = InProcessEngine(shared_engine)
    sync = InProcessSync(mesh, WeightExport(policy.chunks), engine, transform_of("none", WEIGHTS))
    yield RolloutManager(config.RolloutConfig(), mesh, engine, sync, None, ())
    parallel_state.destroy_model_parallel()  # the process group is the engine's too


def test_weights_are_pushed_into_a_woken_engine_before_its_cache_wakes(
    manager: RolloutManager, device: Device, shared_engine: VllmEngine, make_prompt: MakePrompt
) -> None:
    def answered() -> list[list[tuple[list[int], list[float]]]]:
        groups = manager.generate([make_prompt(0), make_prompt(1)], SPEC)
        return [[(r.token_ids.tolist(), r.logprobs.tolist()) for r in g] for g in groups]

    manager.sync_weights(3)
    first = answered()
    assert device.told() == ["load", "decode", "sleep 2"]  # it started awake
    assert shared_engine.version is None
    manager.sync_weights(3)
    assert device.told() == []  # nothing to do until it is asked
    assert answered() == first  # an ask without a sync pushes the weights again
    assert device.told() == PUSH_AND_ANSWER
    manager.sync_weights(4)
    assert device.told() == PUSH_AND_ANSWER[:3]
    [[rollout, _]] = manager.generate([make_prompt(0)], SPEC)
    assert device.told() == PUSH_AND_ANSWER[3:]
    assert (rollout.weight_version, rollout.newest_version) == (4, 4)
    wrong = make_prompt(0)
    wrong.token_ids[-1] += 1
    with pytest.raises(RolloutError, match="vLLM read"):
        manager.generate([wrong], SPEC)
    assert device.told() == [*PUSH_AND_ANSWER[:3], "sleep 2"]  # also when a prompt is refused
    assert answered() == first
