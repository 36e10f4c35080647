"""Grounded question answering: which option is right, and when can it be seen? (NExT-GQA)

The option and the time span are read apart: an answer with one of them unreadable still earns
the other, and its failure is recorded.
"""

from megatron_vrl.tasks.answer import (
    LETTER,
    SECONDS,
    read_fields,
    read_interval,
    read_option,
    template,
)
from megatron_vrl.tasks.multiple_choice import ask
from megatron_vrl.tasks.task import Parsed, Task
from megatron_vrl.types import VideoSample

INSTRUCTION = "Answer with the letter of the best option and the time span that shows it."
TEMPLATE = template(option=LETTER, start_time=SECONDS, end_time=SECONDS)


def question(sample: VideoSample) -> str:
    return ask(sample, INSTRUCTION)


def target(sample: VideoSample) -> str:
    start_s, end_s = sample.intervals_s[0]
    times = f'"start_time": "{start_s:.1f}", "end_time": "{end_s:.1f}"'
    answer = f'{{"option": "{sample.option}", {times}}}'
    return f"<think>{sample.rationale}</think><answer>{answer}</answer>"


def parse(response: str, sample: VideoSample) -> Parsed:
    fields, failure = read_fields(response)
    option, no_option = read_option(fields.get("option"), sample.options)
    interval_s, no_interval = read_interval(fields, sample.duration_s)
    failure = failure or no_option or no_interval
    formatted = not failure and TEMPLATE.fullmatch(response.strip()) is not None
    return Parsed(interval_s=interval_s, option=option, formatted=formatted, failure=failure)


GROUNDED_QA = Task(
    name="grounded_qa",
    parts=("format", "temporal_iou", "accuracy"),
    question=question,
    temporal_r1_question=question,
    target=target,
    parse=parse,
)
