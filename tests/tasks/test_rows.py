"""One contract for every row of every dict where a new thing plugs in."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from megatron_vrl.algorithms import ALGORITHMS, has_signal, token_loss
from megatron_vrl.config import Algorithm, Data, Rewards, Source
from megatron_vrl.data.formats.training import READERS
from megatron_vrl.evaluation.metrics import summarise
from megatron_vrl.rewards.score import score
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import SYSTEM_PROMPTS, TASKS, can_be_asked
from megatron_vrl.tasks.short_answer import ShortAnswer
from megatron_vrl.types import Parsed, Sample, VideoClip
from tests.algorithms.make_tokens import tokens_of

SAMPLE = Sample(
    id="v/0",
    task="",
    media=(VideoClip("v.mp4"),),
    duration_s=30.0,
    query="the red square is visible",
    rationale="the red square",
    intervals_s=((6.0, 15.0), (20.0, 21.5)),
    options=("red", "blue"),
    option="A",
)
TRUTHS = {"short_answer": ShortAnswer(answer="two")}  # of tasks with a truth of their own


def sample_of(task: str) -> Sample:
    return replace(SAMPLE, task=task, truth=TRUTHS.get(task))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_accepts_its_own_target(name: str) -> None:
    task, sample = TASKS[name], sample_of(name)
    assert task.name == name
    assert can_be_asked(sample)
    assert not can_be_asked(replace(sample, intervals_s=(), option="", truth=None))
    assert sample.query in task.question(sample)
    for rationale in ("because", ""):
        response = task.target(replace(sample, rationale=rationale))
        assert task.parse(response, sample).formatted
        for mode in ("strict", "temporal_r1"):
            components, total = score(sample, response, mode, reward_weights(Rewards())[name])
            assert components == dict.fromkeys(task.components, 1.0)
            assert total == 1.0
    assert summarise([sample], [task.target(sample)], Rewards())[f"{name}/reward/mean"] == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_the_fields_of_a_task_name_its_own_components_and_metrics(name: str) -> None:
    task, sample = TASKS[name], sample_of(name)
    assert set(task.default_weights) == set(task.components)
    assert set(task.correctness) <= set(task.components)
    assert set(task.temporal_r1_components) in (set(), set(task.components))
    nothing = Parsed(failure="nothing was read")
    for component in (*task.components.values(), *task.optional_components.values()):
        assert component(sample, nothing) == 0.0
    metrics = task.metrics([sample], [nothing])
    assert set(task.titles) <= set(metrics) and not any(metrics.values())
    baselines = task.baselines([sample, sample])
    assert "best constant" in baselines
    for responses in baselines.values():
        assert [task.parse(response, sample).failure for response in responses] == ["", ""]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_prefers_the_better_answer(name: Any) -> None:
    algorithm = ALGORITHMS[name]
    (advantages,) = algorithm.advantages([np.array([0.0, 1.0])])
    assert advantages[0] < 0 < advantages[1] and has_signal(advantages)
    assert not any(has_signal(of_group) for of_group in algorithm.advantages([np.full(3, 0.1)] * 2))
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    tokens = tokens_of(
        logprobs, torch.tensor(advantages), reference=logprobs.detach(), lengths=[1, 1]
    )
    loss, metrics = token_loss(tokens, Algorithm(name=name))
    assert loss.shape == (2,)
    assert all(value.shape == (2,) and not value.requires_grad for value in metrics.values())
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0] > 0 > logprobs.grad[1]  # descent lowers the worse, lifts the better


def test_the_rows_are_those_the_config_knows() -> None:
    assert set(reward_weights(Rewards())) == set(TASKS)
    assert set(READERS) == set(get_args(Source.model_fields["format"].annotation))
    assert set(ALGORITHMS) == set(get_args(Algorithm.model_fields["name"].annotation))
    assert set(SYSTEM_PROMPTS) == set(get_args(Data.model_fields["system_prompt"].annotation))
