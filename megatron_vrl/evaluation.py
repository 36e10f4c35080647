"""Evaluation on the rollout engine: greedy answers, the reward's own parser, task metrics."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_vrl.build import Parts, interleave
from megatron_vrl.config import Rewards
from megatron_vrl.parallel.mesh import gather_objects, world_axis
from megatron_vrl.rewards.metrics import (
    best_constant_interval,
    best_constant_letter,
    summarise,
)
from megatron_vrl.rollout.requests import SamplingSpec
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Interval, VideoSample

SAMPLES_AT_A_TIME = 128  # per rank; bounds the decoded frames in memory


def evaluate(parts: Parts, samples: Sequence[VideoSample], version: int) -> dict[str, float]:
    """Metrics of one greedy answer to each sample. Every rank calls it and gets them all."""
    cfg, mesh = parts.cfg, parts.mesh
    parts.rollouts.hand_over(version)
    spec = SamplingSpec(
        n=1, temperature=0.0, top_p=1.0, max_tokens=cfg.evaluation.max_response_tokens, seed=0
    )
    own = list(samples[mesh.rank :: mesh.world])
    most = -(-len(samples) // mesh.world)  # every rank joins every agreement on videos
    answers: list[tuple[str, int]] = []
    for start in range(0, most, SAMPLES_AT_A_TIME):
        prompts = parts.encode(own[start : start + SAMPLES_AT_A_TIME])
        rollouts = parts.rollouts.generate(prompts, spec)
        answers += [(rollout.text, len(rollout.token_ids)) for (rollout,) in rollouts]
    ordered = interleave(gather_objects(world_axis(mesh), answers))
    metrics = summarise(samples, [text for text, _ in ordered], cfg.rewards)
    metrics["response_tokens"] = float(np.mean([length for _, length in ordered]))
    return metrics


def trivial_answers(samples: Sequence[VideoSample], cfg: Rewards) -> dict[str, dict[str, float]]:
    """What answers score that look at neither video nor question: label -> metrics.

    They are written in the right form and scored like a model's. "best constant" is the best
    interval (as a share of the duration) and letter for these very samples.
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


def _answer(sample: VideoSample, share: Interval, letter: str) -> str:
    interval_s = (share[0] * sample.duration_s, share[1] * sample.duration_s)
    return TASKS[sample.task].target(replace(sample, intervals_s=(interval_s,), option=letter))
