"""Temporal grounding: when does the described content occur?

The question's wording, with its odd "?." ending, is the one Temporal-R1 is evaluated with
(arXiv 2506.01908). The target names the first true interval.
"""

from megatron_vrl.tasks.answer import SECONDS, read_fields, read_interval, template
from megatron_vrl.tasks.task import Parsed, Task
from megatron_vrl.types import VideoSample

QUESTION = 'Give the query: "{query}", when does the described content occur in the video?.'
TEMPLATE = template(start_time=SECONDS, end_time=SECONDS)


def question(sample: VideoSample) -> str:
    return QUESTION.format(query=sample.query)


def target(sample: VideoSample) -> str:
    start_s, end_s = sample.intervals_s[0]
    answer = f'{{"start_time": "{start_s:.1f}", "end_time": "{end_s:.1f}"}}'
    return f"<think>{sample.rationale}</think><answer>{answer}</answer>"


def parse(response: str, sample: VideoSample) -> Parsed:
    fields, failure = read_fields(response)
    interval_s, no_interval = read_interval(fields, sample.duration_s)
    failure = failure or no_interval
    formatted = not failure and TEMPLATE.fullmatch(response.strip()) is not None
    return Parsed(interval_s=interval_s, formatted=formatted, failure=failure)


TEMPORAL_GROUNDING = Task(
    name="temporal_grounding",
    parts=("format", "temporal_iou"),
    question=question,
    temporal_r1_question=question,
    target=target,
    parse=parse,
)
