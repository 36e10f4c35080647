"""A task with a truth of its own and no component `format`, wherever tasks are looked at."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from megatron_vrl.config import Parallel, Rewards, Selection
from megatron_vrl.context import RunContext
from megatron_vrl.errors import DataError
from megatron_vrl.evaluation.during_training import trivial_answers
from megatron_vrl.evaluation.grading import Grader
from megatron_vrl.evaluation.metrics import summarise
from megatron_vrl.observe.selection_report import selection_report
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.selection.rules import KEPT, candidate, select
from megatron_vrl.tasks import TASKS, Task, Truth
from megatron_vrl.trainer.metrics import answer_metrics
from megatron_vrl.types import Experience, Parsed, Rollout, Sample, VideoClip
from tests.tiny import prompt


class Count(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    count: int


def count_error(sample: Sample, parsed: Parsed) -> float:
    return 0.0 if parsed.value is None else 1 / (1 + abs(parsed.value - sample.truth.count))


def parse(response: str, sample: Sample) -> Parsed:
    if response.isdigit():
        return Parsed(value=int(response), formatted=True)
    return Parsed(failure=f"{response!r} is not a number")


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(
        name="counting",
        truth=Truth(record=Count),
        question=lambda sample: f"How often? {sample.query}",
        target=lambda sample: str(sample.truth.count),
        parse=parse,
        components={"count_error": count_error},
        default_weights={"count_error": 2.0},
        correctness={"count_error": "graded"},
        metrics=lambda samples, parsed: {
            "exact": float(
                np.mean([p.value == s.truth.count for s, p in zip(samples, parsed, strict=True)])
            )
        },
        titles={"exact": ("counts right", "%")},
        baselines=lambda samples: {"best constant": [str(samples[0].truth.count)] * len(samples)},
    )
    monkeypatch.setitem(TASKS, "counting", task)


def sample(count: int, task: str = "counting") -> Sample:
    return Sample(
        id=f"v/{count}",
        task=task,
        media=(VideoClip("v.mp4"),),
        duration_s=10.0,
        query="a ball bounces",
        rationale="",
        intervals_s=((0.0, 5.0),) if task != "counting" else (),
        options=(),
        option="",
        truth=Count(count=count) if task == "counting" else None,
    )


def rollout(text: str) -> Rollout:
    return Rollout(
        token_ids=np.zeros(400, np.int64),
        logprobs=np.zeros(400, np.float32),
        text=text,
        finish="stop",
        weight_version=0,
        newest_version=0,
        seed=0,
    )


def test_it_trains_and_its_metrics_have_no_format_rate() -> None:
    manager = RewardManager(Rewards(weights={"counting": {"length": 0.5}}))
    answers = [rollout("3"), rollout("4"), rollout("a few")]
    (group,) = manager.groups([sample(3)], [prompt([], 0)], [answers])
    assert group.components["count_error"].values.tolist() == [1.0, 0.5, 0.0]
    assert group.components["length"].values.tolist() == [1.0, 1.0, 0.0]  # right ones alone
    assert group.total.tolist() == [2.5, 1.5, 0.0]
    mesh = init_mesh(Parallel(), seed=1)
    try:
        experience = Experience(scored=group, advantages=group.total)
        ctx = cast(RunContext, SimpleNamespace(mesh=mesh))
        numbers = answer_metrics(ctx, [experience], version=0)
    finally:
        close_mesh()
    assert numbers["reward/count_error"] == 0.5 and "reward/format" not in numbers


def test_an_evaluation_beside_another_task() -> None:
    samples = [sample(3), sample(4), sample(0, "temporal_grounding")]
    summary = summarise(samples, ["3", "5", "?"], Rewards())
    assert summary["counting/exact"] == 0.5 and summary["counting/reward/mean"] == 1.5
    assert "counting/format_rate" not in summary
    assert summary["format_rate"] == summary["temporal_grounding/format_rate"] == 0.0
    assert "format_rate" not in summarise(samples[:2], ["3", "5"], Rewards())
    trivial = trivial_answers(samples, Rewards())
    assert list(trivial) == ["best constant", "whole video"]
    for metrics in trivial.values():  # not the truth of each sample
        assert metrics["counting/exact"] == 0.5
    assert trivial["whole video"]["temporal_grounding/miou"] == 0.5


def test_a_stored_response_is_graded() -> None:
    grader = Grader(task="counting", mode="temporal_r1", weights={"count_error": 1.0})
    assert grader.grade({"id": 1, "response": "4", "truth": {"count": 3}}) == {
        "id": 1,
        "score": 0.5,
        "parts": {"count_error": 0.5},
        "parsed": {"value": 4},
        "failure": None,
    }
    with pytest.raises(DataError, match="field 'truth' is missing, which counting needs"):
        grader.grade({"id": 1, "response": "4"})
    with pytest.raises(DataError, match=r"field 'truth.count' is '3', refused: Input should be"):
        grader.grade({"id": 1, "response": "4", "truth": {"count": "3"}})


def test_it_is_selected_by_the_spread_of_its_graded_component() -> None:
    rows = [{"components": {"count_error": v}, "failure": None} for v in (0.0, 1.0)]
    (found,) = select([candidate("a", "counting", rows, {"count_error": 2.0})], Selection())
    assert (found.verdict, found.rank, found.reward.mean) == (KEPT, 0.5, 1.0)
    summary = {"rules": {}, "verdicts": {"counting": {KEPT: 1}}, "kept": 1, "answered": 1}
    assert "mean count_error" in selection_report(summary | {"pool": 1}, [found.row()])
