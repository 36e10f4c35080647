"""Multi-segment grounding: the model names every interval in which the described content occurs.

The answer is one JSON object, {"intervals": [[start, end], ...]}, in seconds, in any order. The SFT
target is the union of the true intervals, ordered by start. Answer and truth are scored as sets, so
intervals that overlap or touch count once; `matched_giou` alone counts them. The name is MUSEG's
(arXiv 2505.20715).

`multi_segment: true` of a source asks its questions of `temporal_grounding` in this form. The form
does not depend on the number of true intervals, which the question would give away.
"""

from collections.abc import Sequence

from megatron_vrl.rewards import (
    format,
    matched_giou,
    segment_f1,
    temporal_iou,
    temporal_wasserstein,
)
from megatron_vrl.rewards.interval_sets import merge
from megatron_vrl.tasks.answer import intervals_template, read_fields, read_intervals
from megatron_vrl.tasks.baselines import interval_set_baselines
from megatron_vrl.tasks.metrics import interval_set_metrics
from megatron_vrl.tasks.task import Task, Truth
from megatron_vrl.types import Interval, Parsed, Sample

QUESTION = (
    'Give the query: "{query}", when does the described content occur in the video? '
    'Name every interval, in seconds: {{"intervals": [[start, end], ...]}}.'
)
TEMPLATE = intervals_template()


def question(sample: Sample) -> str:
    return QUESTION.format(query=sample.query)


def target(sample: Sample) -> str:
    pairs = ", ".join(f"[{start_s:.1f}, {end_s:.1f}]" for start_s, end_s in _truth(sample))
    return f'<think>{sample.rationale}</think><answer>{{"intervals": [{pairs}]}}</answer>'


def parse(response: str, sample: Sample) -> Parsed:
    fields, failure = read_fields(response)
    intervals_s, no_intervals = read_intervals(fields, sample.duration_s)
    failure = failure or no_intervals
    formatted = not failure and TEMPLATE.fullmatch(response.strip()) is not None
    return Parsed(intervals_s=intervals_s, formatted=formatted, failure=failure)


def baselines(samples: Sequence[Sample]) -> dict[str, list[str]]:
    return interval_set_baselines(samples, target)


def _truth(sample: Sample) -> Sequence[Interval]:
    """Return the union of the true intervals as written, without those of less than 0.1 s."""
    written = [(round(start_s, 1), round(end_s, 1)) for start_s, end_s in sample.intervals_s]
    return merge([(start_s, end_s) for start_s, end_s in written if start_s < end_s] or written)


MULTI_SEGMENT_GROUNDING = Task(
    name="multi_segment_grounding",
    truth=Truth(intervals=True),
    needs_one_video=True,
    question=question,
    target=target,
    parse=parse,
    components={"format": format.score, "temporal_iou": temporal_iou.score_set},
    default_weights={"format": 0.5, "temporal_iou": 0.5},
    optional_components={
        "temporal_wasserstein": temporal_wasserstein.score_set,
        "segment_f1": segment_f1.score,
        "matched_giou": matched_giou.score,
    },
    correctness={"temporal_iou": "graded"},
    metrics=interval_set_metrics,
    titles={
        "miou": ("mIoU of sets", "%"),
        "iou@0.3": ("set IoU of at least 0.3", "%"),
        "iou@0.5": ("set IoU of at least 0.5", "%"),
        "iou@0.7": ("set IoU of at least 0.7", "%"),
        "f1": ("F1 of sets", "%"),
        "count_accuracy": ("right number of intervals", "%"),
    },
    baselines=baselines,
)
