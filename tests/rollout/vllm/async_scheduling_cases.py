"""VllmEngine with vLLM's asynchronous scheduling, which is on for GPUs and off on a CPU.

Only the line of vLLM's CPU platform that turns it off is undone. test_gpu_model_runner.py runs
these tests, since GPUs have another model runner too.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from megatron_vrl import config
from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.request import SamplingSpec, make_request
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.types import Rollout
from tests.rollout.conftest import MakePrompt, Weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig

pytestmark = pytest.mark.slow
SPEC = SamplingSpec(n=4, temperature=1.0, top_p=1.0, max_tokens=16, seed=3)


@pytest.fixture(scope="module")
def asynchronous(checkpoint: Path) -> VllmEngine:
    from vllm.platforms.cpu import CpuPlatform

    checked = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type[CpuPlatform], vllm_config: "VllmConfig") -> None:
        checked(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
        cfg = config.RolloutConfig(kv_cache_mib=64)
        engine = VllmEngine(str(checkpoint), cfg, dtype="float32", seed=1, max_model_len=256)
    core = engine._llm.llm_engine.engine_core.engine_core
    assert core.batch_queue is not None and core.batch_queue_size == 2
    return engine


def values(groups: Iterable[Iterable[Rollout]]) -> list[list[tuple[list[int], list[float], str]]]:
    return [[(r.token_ids.tolist(), r.logprobs.tolist(), r.finish) for r in g] for g in groups]


def test_it_answers_as_the_synchronous_engine(
    engine: VllmEngine, asynchronous: VllmEngine, weights: Weights, make_prompt: MakePrompt
) -> None:
    asynchronous.push_weights(weights.items(), version=1)
    assert asynchronous.weights_checksum() == tensor_checksums(weights.items(), torch.float32)
    prompts = [make_prompt(0), make_prompt(1, (2, 4, 4), 1.0)]
    expected = values(engine.generate(prompts, SPEC))
    assert values(asynchronous.generate(prompts, SPEC)) == expected
    asynchronous.submit("dropped", make_request(prompts[1]), SPEC)
    asynchronous.step()
    asynchronous.step()
    asynchronous.abort(["dropped"])
    assert not asynchronous.busy
    assert values(asynchronous.generate(prompts, SPEC)) == expected


def test_a_token_is_stamped_with_the_weights_that_computed_it(
    asynchronous: VllmEngine, weights: Weights, make_prompt: MakePrompt
) -> None:
    """A weight sync comes while a batch is in flight that finishes a request."""
    asynchronous.push_weights(weights.items(), version=1)
    request, spec = make_request(make_prompt(0)), SPEC.for_prompt(0)
    [whole] = asynchronous.generate([make_prompt(0)], SPEC)
    longest = max(len(rollout.token_ids) for rollout in whole)
    asynchronous.submit("a", request, spec)
    for _ in range(longest):  # one step more returns the last token
        assert not asynchronous.step()
    changed = {name: tensor * 1.02 for name, tensor in weights.items()}
    asynchronous.push_weights(changed.items(), version=2)
    assert asynchronous.busy
    asynchronous.submit("b", request, spec)
    finished = asynchronous.step()
    assert values(finished.values()) == values([whole])
    assert {(r.weight_version, r.newest_version) for r in finished["a"]} == {(1, 1)}
    while asynchronous.busy:
        finished |= asynchronous.step()
    assert {(r.weight_version, r.newest_version) for r in finished["b"]} == {(2, 2)}


def test_a_request_goes_on_with_new_weights(
    asynchronous: VllmEngine, weights: Weights, make_prompt: MakePrompt
) -> None:
    asynchronous.push_weights(weights.items(), version=1)
    prompt, spec = make_prompt(0), SPEC.for_prompt(0)
    [alone] = asynchronous.generate([prompt], SPEC)
    asynchronous.submit("a", make_request(prompt), spec)
    for _ in range(6):  # 5 tokens have come out and a sixth is in flight
        assert not asynchronous.step()
    changed = {name: tensor * 1.02 for name, tensor in weights.items()}
    asynchronous.push_weights(changed.items(), version=2)
    finished: dict[str, list[Rollout]] = {}
    while asynchronous.busy:
        finished |= asynchronous.step()
    for before, rollout in zip(alone, finished["a"], strict=True):
        assert (rollout.weight_version, rollout.newest_version) == (1, 2)
        np.testing.assert_array_equal(rollout.logprobs[:6], before.logprobs[:6])
        assert rollout.logprobs[6] != before.logprobs[6]


def test_a_prefix_cache_that_stays_is_an_error(
    asynchronous: VllmEngine, weights: Weights, make_prompt: MakePrompt
) -> None:
    """vLLM keeps the cache while a request holds blocks: its keys would be those of old weights."""
    asynchronous.push_weights(weights.items(), version=1)
    asynchronous.submit("a", make_request(make_prompt(0)), SPEC.for_prompt(0))
    asynchronous.step()
    known, asynchronous._in_flight = asynchronous._in_flight, {}
    with pytest.raises(RolloutError, match="vLLM kept its prefix cache"):
        asynchronous.push_weights(weights.items(), version=2)
    assert asynchronous.version is None
    asynchronous._in_flight = known
    asynchronous.abort(["a"])
    asynchronous.push_weights(weights.items(), version=2)
