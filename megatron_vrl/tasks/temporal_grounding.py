"""Temporal grounding: the model names the interval in which the described content occurs.

The question, including its ending "?.", is the one of Temporal-R1's evaluation (arXiv 2506.01908).
The SFT target is the first interval of the ground truth.
"""

from collections.abc import Sequence

from megatron_vrl.rewards import (
    boundary_iou,
    diou,
    format,
    giou,
    temporal_iou,
    temporal_r1,
    temporal_wasserstein,
)
from megatron_vrl.tasks.answer import SECONDS, read_fields, read_interval, template
from megatron_vrl.tasks.baselines import interval_baselines
from megatron_vrl.tasks.metrics import interval_metrics
from megatron_vrl.tasks.task import Task, Truth
from megatron_vrl.types import Parsed, Sample

QUESTION = 'Give the query: "{query}", when does the described content occur in the video?.'
TEMPLATE = template(start_time=SECONDS, end_time=SECONDS)


def question(sample: Sample) -> str:
    return QUESTION.format(query=sample.query)


def target(sample: Sample) -> str:
    start_s, end_s = sample.intervals_s[0]
    answer = f'{{"start_time": "{start_s:.1f}", "end_time": "{end_s:.1f}"}}'
    return f"<think>{sample.rationale}</think><answer>{answer}</answer>"


def parse(response: str, sample: Sample) -> Parsed:
    fields, failure = read_fields(response)
    interval_s, no_interval = read_interval(fields, sample.duration_s)
    failure = failure or no_interval
    formatted = not failure and TEMPLATE.fullmatch(response.strip()) is not None
    return Parsed(interval_s=interval_s, formatted=formatted, failure=failure)


def baselines(samples: Sequence[Sample]) -> dict[str, list[str]]:
    return interval_baselines(samples, target)


TEMPORAL_GROUNDING = Task(
    name="temporal_grounding",
    truth=Truth(intervals=True),
    needs_one_video=True,
    question=question,
    target=target,
    parse=parse,
    components={"format": format.score, "temporal_iou": temporal_iou.score},
    default_weights={"format": 0.5, "temporal_iou": 0.5},
    optional_components={
        "boundary_iou": boundary_iou.score,
        "temporal_wasserstein": temporal_wasserstein.score,
        "giou": giou.score,
        "diou": diou.score,
    },
    correctness={"temporal_iou": "graded"},
    metrics=interval_metrics,
    titles={
        "miou": ("mIoU", "%"),
        "r1@0.3": ("R@0.3", "%"),
        "r1@0.5": ("R@0.5", "%"),
        "r1@0.7": ("R@0.7", "%"),
    },
    baselines=baselines,
    temporal_r1_components={
        "format": temporal_r1.format_score,
        "temporal_iou": temporal_r1.temporal_iou,
    },
)
