"""Evaluation of a run on its rollout engine: greedy answers and task metrics.

Answers are read by the parser of the rewards. A question whose video cannot be read counts as
answered with an empty text. The metric `undecodable` counts such questions.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_vrl.config import Rewards
from megatron_vrl.context import RunContext
from megatron_vrl.data.problems import Problem, summary
from megatron_vrl.errors import UserError, VideoError, counted
from megatron_vrl.evaluation.metrics import Scored, metrics_of, score_responses, summarise
from megatron_vrl.parallel.mesh import gather_shards, raise_on_all_ranks, shard, world_axis
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.storage.files import write_file
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.answer import answer_block
from megatron_vrl.trainer.preemption import stop_if_asked
from megatron_vrl.types import Prompt, Sample

SAMPLES_AT_A_TIME = 128  # per rank; bounds the decoded frames in memory


def evaluate(
    ctx: RunContext,
    samples: Sequence[Sample],
    version: int,
    step: int,
    answers_file: Path | None = None,
) -> dict[str, float]:
    """Return the metrics of one greedy answer to each sample. Every rank calls it.

    `version` identifies the weights; `step` is the last finished step. Rank 0 writes a line for
    each answer to `answers_file`: {id, task, response, reward, components}. Raises on every rank:
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
    scored = score_responses(samples, [answer.text for answer in ordered], cfg.rewards)
    if answers_file:
        with raise_on_all_ranks(mesh):
            if mesh.rank == 0:
                _write_answers(answers_file, scored, [answer.text for answer in ordered])
    metrics = metrics_of(scored)
    read = [answer.tokens for answer in ordered if not answer.problem]
    metrics["response_length/mean"] = float(np.mean(read)) if read else 0.0
    metrics["undecodable"] = float(len(ordered) - len(read))
    return metrics


def _write_answers(path: Path, scored: Sequence[Scored], responses: Sequence[str]) -> None:
    """Write a line for each answer, in the order of the questions."""
    rows = (
        {
            "id": row.sample.id,
            "task": row.sample.task,
            "response": response,
            "reward": row.reward,
            "components": row.components,
        }
        for row, response in zip(scored, responses, strict=True)
    )
    path.parent.mkdir(exist_ok=True)
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


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
    message = f"{len(bad)} of {asked} of an evaluation have bad videos: {summary(bad)}"
    if len(bad) > most * count:
        raise UserError(
            f"{message}; that is over video.max_bad_fraction={most}: check the data with "
            "tools/check_data.py, or raise the limit."
        )
    if ctx.mesh.rank == 0:
        tqdm.write(f"{message}; they count as empty answers.", file=sys.stderr)


def trivial_answers(samples: Sequence[Sample], cfg: Rewards) -> dict[str, dict[str, float]]:
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
                bare = cfg.mode == "answer_only"
                responses[index] = answer_block(response) if bare else response
        metrics[label] = summarise(samples, responses, cfg)
    return metrics
