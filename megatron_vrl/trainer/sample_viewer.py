"""Samples shown in the report: question, videos and images, and every answer with its rewards."""

from collections.abc import Sequence
from itertools import chain

from megatron_vrl.context import RunContext
from megatron_vrl.observe import samples
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import MEDIA_PLACE, Experience, Sample, VideoClip


def log_samples(
    ctx: RunContext, sinks: Sinks, experiences: Sequence[Experience], step: int
) -> None:
    """Write groups of a step for the report. Rank 0 writes and every rank calls."""
    with raise_on_all_ranks(ctx.mesh):
        for experience in experiences:
            sinks.log_sample(_logged_sample(experience, step), experience.scored.prompt.visuals)


def _logged_sample(experience: Experience, step: int) -> samples.LoggedSample:
    sample = experience.scored.sample
    return samples.LoggedSample(
        phase="grpo",
        step=step,
        sample_id=sample.id,
        task=sample.task,
        question=with_names(TASKS[sample.task].question(sample), sample),
        options=sample.options,
        option=sample.option,
        intervals_s=sample.intervals_s,
        duration_s=sample.duration_s,
        answers=tuple(_answer(experience, i) for i in range(len(experience.advantages))),
    )


def with_names(question: str, sample: Sample) -> str:
    """Return the question with a name at each place of a medium, such as "[image 2]"."""
    before, *after = question.split(MEDIA_PLACE)
    kinds = ["video" if isinstance(one, VideoClip) else "image" for one in sample.media]
    named = [f"[{kind} {kinds[: i + 1].count(kind)}]" for i, kind in enumerate(kinds)]
    return before + "".join(chain.from_iterable(zip(named, after, strict=False)))


def _answer(experience: Experience, index: int) -> samples.Answer:
    group = experience.scored
    sample, rollout = group.sample, group.rollouts[index]
    parsed = TASKS[sample.task].parse(rollout.text, sample)
    return samples.Answer(
        text=rollout.text,
        intervals_s=parsed.shown_intervals_s,
        option=parsed.option,
        components={name: float(c.values[index]) for name, c in group.components.items()},
        reward=float(group.total[index]),
        advantage=float(experience.advantages[index]),
        tokens=len(rollout.token_ids),
    )
