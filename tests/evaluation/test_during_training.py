"""A question whose video cannot be read stays in an evaluation, and is counted."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, cast

import numpy as np
import pytest

from megatron_vrl.config import Evaluation, Parallel, Rewards, Video
from megatron_vrl.context import RunContext
from megatron_vrl.errors import StopRequested, UserError, VideoError
from megatron_vrl.evaluation import during_training
from megatron_vrl.evaluation.during_training import evaluate, trivial_answers
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.process import signals
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Prompt, Rollout, Sample, VideoClip
from tests.tiny import prompt, video


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def sample(number: int) -> Sample:
    return Sample(
        id=f"s{number}",
        task="temporal_grounding",
        media=(VideoClip(f"{number}.mp4"),),
        duration_s=10.0,
        query="a square",
        rationale="",
        intervals_s=((1.0, 2.0),),
        options=(),
        option="",
    )


def ctx_of(mesh: Mesh, samples: list[Sample], bad: set[str], share: float) -> RunContext:
    """Every readable question is answered right."""
    text = TASKS["temporal_grounding"].target(samples[0])
    answer = Rollout(
        token_ids=np.arange(6),
        logprobs=np.zeros(6, dtype=np.float32),
        text=text,
        finish="stop",
        weight_version=0,
        newest_version=0,
        seed=0,
    )
    shown = prompt([video((1, 2, 2), 1.0, 0)], 0)

    def load(block: list[Sample]) -> list[VideoError | Prompt]:
        return [
            VideoError(f"{s.first_path} is empty.", "empty") if s.id in bad else shown
            for s in block
        ]

    made = SimpleNamespace(
        cfg=SimpleNamespace(
            evaluation=Evaluation(), rewards=Rewards(), video=Video(max_bad_fraction=share)
        ),
        mesh=mesh,
        prompts=SimpleNamespace(load=load),
        embed=list,
        rollout_manager=SimpleNamespace(
            sync_weights=lambda version: None,
            generate=lambda prompts, spec: [[answer] for _ in prompts],
        ),
    )
    return cast(RunContext, made)


def test_bad_videos_count_as_answered_with_nothing(
    mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [sample(number) for number in range(10)]
    metrics = evaluate(ctx_of(mesh, samples, {"s3", "s7"}, share=0.2), samples, version=0, step=0)
    assert metrics["undecodable"] == 2
    assert metrics["temporal_grounding/miou"] == pytest.approx(0.8)
    assert metrics["response_length/mean"] == 6
    stderr = capsys.readouterr().err
    assert "10 questions of an evaluation have bad videos: 2 empty (first 3.mp4, 7.mp4)" in stderr


def test_too_many_bad_videos_end_the_run(mesh: Mesh) -> None:
    samples = [sample(number) for number in range(10)]
    with pytest.raises(UserError, match=r"over video.max_bad_fraction=0.1: check the data"):
        evaluate(ctx_of(mesh, samples, {"s3", "s7"}, share=0.1), samples, version=0, step=0)


def test_without_bad_videos_nothing_is_printed(
    mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [sample(number) for number in range(3)]
    metrics = evaluate(ctx_of(mesh, samples, set(), share=0.0), samples, version=0, step=0)
    assert metrics["undecodable"] == 0
    assert metrics["temporal_grounding/miou"] == pytest.approx(1.0)
    assert capsys.readouterr().err == ""


def test_every_answer_is_written_with_its_components(mesh: Mesh, tmp_path: Path) -> None:
    samples = [sample(number) for number in range(4)]
    ctx = ctx_of(mesh, samples, {"s3"}, share=0.5)
    metrics = evaluate(ctx, samples, 0, 0, tmp_path / "evaluations" / "sft-heldout.jsonl")
    lines = (tmp_path / "evaluations/sft-heldout.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == ["s0", "s1", "s2", "s3"]
    ious = [row["components"]["temporal_iou"] for row in rows]
    assert ious == pytest.approx([1.0, 1.0, 1.0, 0.0])
    assert np.mean(ious) == pytest.approx(metrics["temporal_grounding/miou"])
    assert rows[0]["response"] == TASKS["temporal_grounding"].target(samples[0])
    assert np.mean([row["reward"] for row in rows]) == pytest.approx(metrics["reward/mean"])


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (0, "Stopped before the first step, in an evaluation, as asked; "),
        (7, "Stopped after step 7, in an evaluation, as asked; the same command goes on from "),
    ],
)
def test_a_stop_request_ends_the_evaluation_after_its_batch(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, step: int, sentence: str
) -> None:
    samples = [sample(number) for number in range(10)]
    ctx = ctx_of(mesh, samples, set(), share=0.0)
    monkeypatch.setattr(during_training, "SAMPLES_AT_A_TIME", 3)
    monkeypatch.setattr(signals._state, "stop_requested", False)
    answer = ctx.rollout_manager.generate
    answered: list[int] = []

    def generate(prompts: list[Prompt], spec: SamplingSpec) -> list[list[Rollout]]:
        answered.append(len(prompts))
        if len(answered) == 2:
            signals._handle(signal.SIGUSR1, sender=0)
        return answer(prompts, spec)

    monkeypatch.setattr(ctx.rollout_manager, "generate", generate)
    with pytest.raises(StopRequested) as stop:
        evaluate(ctx, samples, 0, step)
    assert answered == [3, 3] and str(stop.value).startswith(sentence)
    monkeypatch.setattr(signals._state, "stop_requested", False)
    assert evaluate(ctx, samples, 0, step)["undecodable"] == 0
    assert answered == [3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("mode", ["strict", "answer_only", "temporal_r1"])
def test_trivial_answers_have_the_format_of_the_mode(
    mode: Literal["strict", "answer_only", "temporal_r1"],
) -> None:
    of_label = trivial_answers([sample(0), sample(1)], Rewards(mode=mode))
    assert {metrics["format_rate"] for metrics in of_label.values()} == {1.0}
    assert of_label["whole video"]["temporal_grounding/miou"] == 0.1
