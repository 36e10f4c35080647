"""Evaluation on the rollout engine: greedy answers, the reward's own parser, task metrics.

A question whose video cannot be read stays in and counts as answered with nothing; the metric
`undecodable` says how many there are.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_vrl.config import Rewards
from megatron_vrl.context import RunContext, interleave
from megatron_vrl.data.problems import Problem, summary
from megatron_vrl.errors import UserError, VideoError, counted
from megatron_vrl.evaluation.metrics import summarise
from megatron_vrl.parallel.mesh import gather_objects, world_axis
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.tasks import TASKS
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.types import Prompt, VideoSample

SAMPLES_AT_A_TIME = 128  # per rank; bounds the decoded frames in memory


def evaluate(
    ctx: RunContext, samples: Sequence[VideoSample], version: int, step: int
) -> dict[str, float]:
    """Metrics of one greedy answer to each sample. Every rank calls it and gets them all.

    `step`: the last that is finished. Raises on every rank: StopRequested before the next batch of
    questions if the run was asked to stop, UserError if more than video.max_bad_fraction of the
    videos cannot be read.
    """
    cfg, mesh = ctx.cfg, ctx.mesh
    ctx.rollout_manager.sync_weights(version)
    spec = SamplingSpec(
        n=1, temperature=0.0, top_p=1.0, max_tokens=cfg.evaluation.max_response_tokens, seed=0
    )
    own = list(samples[mesh.rank :: mesh.world])
    most = -(-len(samples) // mesh.world)  # every rank joins every agreement on videos
    answers: list[_Answered] = []
    for start in range(0, most, SAMPLES_AT_A_TIME):
        stop_if_asked(mesh, step, evaluating=True)
        block = own[start : start + SAMPLES_AT_A_TIME]
        encoded = ctx.encode(block)
        prompts = [one for one in encoded if isinstance(one, Prompt)]
        rollouts = iter(ctx.rollout_manager.generate(prompts, spec))
        for sample, one in zip(block, encoded, strict=True):
            if isinstance(one, VideoError):
                answers.append(_Answered("", 0, _problem(sample, one)))
            else:
                (rollout,) = next(rollouts)
                answers.append(_Answered(rollout.text, len(rollout.token_ids)))
    ordered = interleave(gather_objects(world_axis(mesh), answers))
    _check_share([a.problem for a in ordered if a.problem], len(samples), ctx)
    metrics = summarise(samples, [answer.text for answer in ordered], cfg.rewards)
    read = [answer.tokens for answer in ordered if not answer.problem]
    metrics["response_tokens"] = float(np.mean(read)) if read else 0.0
    metrics["undecodable"] = float(len(ordered) - len(read))
    return metrics


class _Answered(NamedTuple):
    text: str
    tokens: int
    problem: Problem | None = None  # with the video


def _problem(sample: VideoSample, error: VideoError) -> Problem:
    return Problem(sample=sample.id, video=sample.video, kind=error.kind, reason=str(error))


def _check_share(bad: Sequence[Problem], count: int, ctx: RunContext) -> None:
    """Every rank has the same `bad`; rank 0 says what they are."""
    if not bad:
        return
    most = ctx.cfg.video.max_bad_fraction
    asked = counted(count, "question")
    found = f"{len(bad)} of {asked} of an evaluation have bad videos: {summary(bad)}"
    if len(bad) > most * count:
        raise UserError(
            f"{found}; that is over video.max_bad_fraction={most}: check the data with "
            "tools/check_data.py, or raise the limit."
        )
    if ctx.mesh.rank == 0:
        tqdm.write(f"{found}; they count as answered with nothing.", file=sys.stderr)


def trivial_answers(samples: Sequence[VideoSample], cfg: Rewards) -> dict[str, dict[str, float]]:
    """Return label -> metrics of answers that look at neither video nor question.

    Each task writes its own (`Task.baselines`). A task without one of the labels answers its
    "best constant" there.
    """
    of_task: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        of_task.setdefault(sample.task, []).append(index)
    answers = {
        task: TASKS[task].baselines([samples[index] for index in indices])
        for task, indices in of_task.items()
    }
    metrics = {}
    for label in dict.fromkeys(label for labelled in answers.values() for label in labelled):
        responses = [""] * len(samples)
        for task, indices in of_task.items():
            chosen = answers[task].get(label, answers[task]["best constant"])
            for index, response in zip(indices, chosen, strict=True):
                responses[index] = response
        metrics[label] = summarise(samples, responses, cfg)
    return metrics
