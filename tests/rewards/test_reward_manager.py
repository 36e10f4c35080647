"""A step's rewards: optional components, a user's own functions, failures, and calls counted."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_vrl.algorithms import advantages
from megatron_vrl.config import Algorithm, Rewards
from megatron_vrl.errors import ConfigError
from megatron_vrl.rewards import boundary_iou
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.rewards.overlong import Overlong
from megatron_vrl.rewards.score import score
from megatron_vrl.rewards.user_functions import Call, Returned, Workers
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Parsed, Rollout, Sample, ScoredGroup, VideoClip
from tests.tiny import prompt

FUNCTIONS = "tests.rewards.user_functions"
SAMPLE = Sample(
    id="v/0",
    task="temporal_grounding",
    media=(VideoClip("v.mp4"),),
    duration_s=30.0,
    query="the door opens",
    rationale="",
    intervals_s=((6.0, 15.0),),
    options=(),
    option="",
)
RIGHT = '<think>x</think><answer>{"start_time": "6.0", "end_time": "15.0"}</answer>'
PROMPT = prompt([], 0)


def rollout(text: str, num_tokens: int = 8) -> Rollout:
    return Rollout(
        token_ids=np.zeros(num_tokens, np.int64),
        logprobs=np.zeros(num_tokens, np.float32),
        text=text,
        finish="stop",
        weight_version=0,
        newest_version=0,
        seed=0,
    )


@contextmanager
def judging(
    overlong: Overlong | None = None,
    **keys: Any,
) -> Iterator[RewardManager]:
    judge = RewardManager(Rewards(function_workers=1, **keys), overlong)
    try:
        yield judge
    finally:
        judge.close()


@pytest.mark.parametrize(
    ("answer_s", "value"),
    [
        ((6.0, 15.0), 1.0),
        ((6.0, 18.0), 9 / 12 * 1.0 * (1 - 3 / 30)),
        ((0.0, 30.0), 9 / 30 * (1 - 6 / 30) * (1 - 15 / 30)),
        ((20.0, 30.0), 0.0),
    ],
)
def test_boundary_iou_by_its_formula(answer_s: tuple[float, float], value: float) -> None:
    parsed = Parsed(interval_s=answer_s)
    assert boundary_iou.score(SAMPLE, parsed) == pytest.approx(value, abs=1e-12)
    several = replace(SAMPLE, intervals_s=((0.0, 1.0), (6.0, 15.0)))
    assert boundary_iou.score(several, parsed) >= boundary_iou.score(SAMPLE, parsed)


def test_an_optional_component_is_there_when_it_is_named() -> None:
    weights = {"format": 0.2, "temporal_iou": 0.3, "boundary_iou": 0.5}
    late = RIGHT.replace("15.0", "18.0")
    for mode in ("strict", "temporal_r1"):
        components, total = score(SAMPLE, late, mode, weights)
        assert components["boundary_iou"] == pytest.approx(0.675)
        assert total == pytest.approx(0.2 + 0.3 * 0.75 + 0.5 * 0.675)
    with pytest.raises(ConfigError, match="no reward component 'boundary_iou'"):
        reward_weights(Rewards(weights={"multiple_choice": {"boundary_iou": 1.0}}))


def test_length_is_worth_something_on_right_answers_only() -> None:
    weights = {"format": 0.0, "temporal_iou": 1.0, "length": 0.2}
    with judging(weights={"temporal_grounding": weights}, length_tokens=(4, 8)) as judge:
        wrong = RIGHT.replace('"6.0"', '"20"').replace('"15.0"', '"25"')
        answers = [rollout(RIGHT, n) for n in (3, 4, 8, 9)] + [rollout(wrong, 6)]
        (group,) = judge.groups([SAMPLE], [PROMPT], [answers])
    assert group.components["length"].values.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    np.testing.assert_allclose(group.total, [1.0, 1.2, 1.2, 1.0, 0.0])


def test_answers_near_the_length_limit_lose_reward_and_the_metric_shows_it() -> None:
    """The penalty is a component: the total that is trained on is the one that is reported."""
    answers = [rollout(RIGHT, n) for n in (4, 6, 8)]
    with judging(Overlong(limit=8, buffer=4, weight=0.4)) as judge:
        (group,) = judge.groups([SAMPLE], [PROMPT], [answers])
        alone = judge.components(SAMPLE, answers)
    assert list(group.components) == ["format", "temporal_iou", "overlong"]
    assert group.components["overlong"].values.tolist() == [0.0, -0.5, -1.0]
    assert group.total.tolist() == [1.0, 1.0 + 0.4 * -0.5, 1.0 + 0.4 * -1.0]
    (advantage,) = advantages([group.components], Algorithm(name="dr_grpo"))
    assert advantage.tolist() == (group.total - group.total.mean()).tolist()
    assert [list(row) for row in alone] == [["format", "temporal_iou"]] * 3


def judged(name: str, texts: list[str], **keys: Any) -> tuple[ScoredGroup, dict[str, list[str]]]:
    """The group and failures of the texts under one function, beside temporal IoU."""
    weights = {"temporal_grounding": {"format": 0.0, "temporal_iou": 1.0, "own": 1.0}}
    functions = {"own": f"{FUNCTIONS}:{name}"}
    with judging(weights=weights, functions=functions, **keys) as judge:
        (group,) = judge.groups([SAMPLE], [PROMPT], [[rollout(text) for text in texts]])
        return group, judge.take_failures()


def test_a_users_function_is_a_component() -> None:
    texts = [RIGHT, "the door opens", ""]
    group, failures = judged("named", texts, function_timeout_s=30.0)
    assert group.components["own"].values.tolist() == [0.0, 1.0, 0.0] and failures == {}
    np.testing.assert_allclose(group.total, [1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("broken", "bad", "raised ZeroDivisionError: division by zero"),
        ("slow", "slow", "took longer than 2 s"),
        ("leaves", "leave", "ended its process (exit code 3)"),
        ("too_much", RIGHT, "returned 3.0, expected a number in [0, 1]"),
        ("nothing", RIGHT, "returned None, which is no number"),
    ],
)
def test_a_failure_is_named_and_never_a_silent_zero(name: str, text: str, what: str) -> None:
    group, failures = judged(name, [text, "fine", "fine"], function_timeout_s=2.0)
    assert math.isnan(group.components["own"].values[0]) and math.isnan(group.total[0])
    assert failures["own"][0] == f"{what}, on an answer to v/0"
    if name in ("broken", "slow", "leaves"):  # it costs the answer it failed on alone
        assert len(failures["own"]) == 1 and np.isfinite(group.total[1:]).all()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere", "'nowhere' is not a function; write package.module:function."),
        ("tests.nowhere:f", "the module does not import (ModuleNotFoundError: No module named"),
        (f"{FUNCTIONS}:absent", "has no function 'absent'."),
    ],
)
def test_a_function_that_is_not_there_is_named_at_the_start(path: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        RewardManager(
            Rewards(
                weights={"multiple_choice": {"own": 1.0}},
                functions={"own": path},
                function_workers=1,
            )
        )
    assert sentence in str(error.value)
    for taken in ("format", "boundary_iou", "length", "overlong", "kl"):
        with pytest.raises(ConfigError, match="this name is taken"):
            RewardManager(Rewards(functions={taken: path}))


def test_an_answer_is_parsed_once_and_functions_get_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The components of an answer share one parse, and all calls of a step go out together."""
    task, run = TASKS["temporal_grounding"], Workers.run
    parsed: list[str] = []
    batches: list[int] = []

    def parse(response: str, sample: Sample) -> Parsed:
        parsed.append(response)
        return task.parse(response, sample)

    def counted(workers: Workers, calls: Sequence[Call]) -> list[Returned]:
        batches.append(len(calls))
        return run(workers, calls)

    monkeypatch.setitem(TASKS, "temporal_grounding", replace(task, parse=parse))
    monkeypatch.setattr(Workers, "run", counted)
    weights = {"format": 0.2, "temporal_iou": 0.3, "boundary_iou": 0.4, "own": 0.1}
    functions = {"own": f"{FUNCTIONS}:brief"}
    texts = [RIGHT.replace("x", f"x{number}") for number in range(12)]
    answers = [[rollout(text) for text in texts[first : first + 4]] for first in (0, 4, 8)]
    with judging(weights={"temporal_grounding": weights}, functions=functions) as judge:
        judge.groups([SAMPLE] * 3, [PROMPT] * 3, answers)
    assert parsed == texts and batches == [12]
