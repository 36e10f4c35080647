"""Evaluation of a run on its rollout engine: greedy answers and task metrics.

Answers are read by the parser of the rewards. A question whose video cannot be read counts as
answered with an empty text. The metric `undecodable` counts such questions.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_vrl.config import Rewards
from megatron_vrl.context import RunContext
from megatron_vrl.data.problems import Problem, summary
from megatron_vrl.errors import UserError, VideoError, counted
from megatron_vrl.evaluation.metrics import (
    best_constant_interval,
    best_constant_letter,
    summarise,
)
from megatron_vrl.parallel.mesh import gather_shards, raise_on_all_ranks, shard, world_axis
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.tasks import TASKS
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.types import Interval, Prompt, VideoSample

SAMPLES_AT_A_TIME = 128  # per rank; bounds the decoded frames in memory


def evaluate(
    ctx: RunContext, samples: Sequence[VideoSample], version: int, step: int
) -> dict[str, float]:
    """Return the metrics of one greedy answer to each sample. Every rank calls it.

    `version` identifies the weights; `step` is the last finished step. Raises on every rank:
    StopRequested before the next batch of questions if the run was asked to stop, UserError if more
    than video.max_bad_fraction of the videos cannot be read.
    """
    cfg, mesh = ctx.cfg, ctx.mesh
    ctx.rollout_manager.sync_weights(version)
    spec = SamplingSpec.greedy(cfg.evaluation.max_response_tokens)
    own = shard(samples, world_axis(mesh))
    most = -(-len(samples) // mesh.world)  # questions of the rank with the most
    answers: list[_Answered] = []
    for start in range(0, most, SAMPLES_AT_A_TIME):
        stop_if_asked(mesh, step, evaluating=True)
        block = own[start : start + SAMPLES_AT_A_TIME]
        with raise_on_all_ranks(mesh):
            loaded = ctx.prompts.load(block)
        prompts = ctx.embed([one for one in loaded if isinstance(one, Prompt)])
        rollouts = iter(ctx.rollout_manager.generate(prompts, spec))
        for sample, one in zip(block, loaded, strict=True):
            if isinstance(one, VideoError):
                answers.append(_Answered("", 0, Problem.of_video(sample, one)))
            else:
                (rollout,) = next(rollouts)
                answers.append(_Answered(rollout.text, len(rollout.token_ids)))
    ordered = gather_shards(answers, world_axis(mesh))
    _check_bad_fraction([a.problem for a in ordered if a.problem], len(samples), ctx)
    metrics = summarise(samples, [answer.text for answer in ordered], cfg.rewards)
    read = [answer.tokens for answer in ordered if not answer.problem]
    metrics["response_tokens"] = float(np.mean(read)) if read else 0.0
    metrics["undecodable"] = float(len(ordered) - len(read))
    return metrics


class _Answered(NamedTuple):
    text: str
    tokens: int
    problem: Problem | None = None  # with the video


def _check_bad_fraction(bad: Sequence[Problem], count: int, ctx: RunContext) -> None:
    """Raises UserError if more than video.max_bad_fraction of the videos are bad.

    Otherwise rank 0 prints a summary. Every rank passes the same `bad`.
    """
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
        tqdm.write(f"{found}; they count as empty answers.", file=sys.stderr)


def trivial_answers(samples: Sequence[VideoSample], cfg: Rewards) -> dict[str, dict[str, float]]:
    """Return the metrics of answers that use neither video nor question: label -> metrics.

    The answers have the right format and are scored like a model's. "best constant" is the interval
    (as a fraction of the duration) and the letter with the best score on these samples.
    """
    constant: dict[str, tuple[Interval, str]] = {}
    for task in {sample.task for sample in samples}:
        of_task = [sample for sample in samples if sample.task == task]
        interval = best_constant_interval(of_task)[0] if of_task[0].intervals_s else (0.0, 1.0)
        letter = best_constant_letter(of_task)[0] if of_task[0].option else ""
        constant[task] = interval, letter
    whole = [_answer(sample, (0.0, 1.0), constant[sample.task][1]) for sample in samples]
    best = [_answer(sample, *constant[sample.task]) for sample in samples]
    return {
        "whole video": summarise(samples, whole, cfg),
        "best constant": summarise(samples, best, cfg),
    }


def _answer(sample: VideoSample, fraction: Interval, letter: str) -> str:
    """Return the text of an answer with an interval (as fractions of the duration) and a letter."""
    interval_s = (fraction[0] * sample.duration_s, fraction[1] * sample.duration_s)
    return TASKS[sample.task].target(replace(sample, intervals_s=(interval_s,), option=letter))
