"""Grounded question answering: which option is right, and when can it be seen? (NExT-GQA)

The option and the interval are read separately: an answer with one of them unreadable still earns
the other, and its failure is recorded.
"""

from collections.abc import Sequence

from megatron_vrl.rewards import (
    accuracy,
    boundary_iou,
    diou,
    format,
    giou,
    temporal_iou,
    temporal_wasserstein,
)
from megatron_vrl.tasks.answer import (
    LETTER,
    SECONDS,
    read_fields,
    read_interval,
    read_option,
    template,
)
from megatron_vrl.tasks.baselines import grounded_option_baselines
from megatron_vrl.tasks.metrics import grounded_option_metrics
from megatron_vrl.tasks.multiple_choice import question_with_options
from megatron_vrl.tasks.task import Task, Truth
from megatron_vrl.types import Parsed, Sample

INSTRUCTION = "Answer with the letter of the best option and the time span that shows it."
TEMPLATE = template(option=LETTER, start_time=SECONDS, end_time=SECONDS)


def question(sample: Sample) -> str:
    return question_with_options(sample, INSTRUCTION)


def target(sample: Sample) -> str:
    start_s, end_s = sample.intervals_s[0]
    times = f'"start_time": "{start_s:.1f}", "end_time": "{end_s:.1f}"'
    answer = f'{{"option": "{sample.option}", {times}}}'
    return f"<think>{sample.rationale}</think><answer>{answer}</answer>"


def parse(response: str, sample: Sample) -> Parsed:
    fields, failure = read_fields(response)
    option, no_option = read_option(fields.get("option"), sample.options)
    interval_s, no_interval = read_interval(fields, sample.duration_s)
    failure = failure or no_option or no_interval
    formatted = not failure and TEMPLATE.fullmatch(response.strip()) is not None
    return Parsed(interval_s=interval_s, option=option, formatted=formatted, failure=failure)


def baselines(samples: Sequence[Sample]) -> dict[str, list[str]]:
    return grounded_option_baselines(samples, target)


GROUNDED_QA = Task(
    name="grounded_qa",
    truth=Truth(intervals=True, option=True),
    needs_one_video=True,
    question=question,
    target=target,
    parse=parse,
    components={
        "format": format.score,
        "temporal_iou": temporal_iou.score,
        "accuracy": accuracy.score,
    },
    default_weights={"format": 0.5, "temporal_iou": 0.25, "accuracy": 0.25},
    optional_components={
        "boundary_iou": boundary_iou.score,
        "temporal_wasserstein": temporal_wasserstein.score,
        "giou": giou.score,
        "diou": diou.score,
    },
    correctness={"accuracy": "binary", "temporal_iou": "graded"},
    metrics=grounded_option_metrics,
    titles={"accuracy": ("QA accuracy", "%"), "miou": ("QA mIoU", "%")},
    baselines=baselines,
)
