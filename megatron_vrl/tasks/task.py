"""Task: a kind of question about videos and images, and everything that is particular to it.

A task owns its question, its ideal answer, its parser, the fields that hold the truth, its reward
components with their default weights, and its metrics. Training, evaluation, selection and
tools/grade.py read all of it from here, so a new task is one file and one row of `TASKS`
(docs/extending.md builds one).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from megatron_vrl.types import Parsed, Sample

Component = Callable[[Sample, Parsed], float]  # a score in [0, 1]; 0 if nothing was read
TextComponent = Callable[[Sample, str], float]  # reads the response itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Fields of Sample that hold the right answer to a task's questions."""

    intervals: bool = False  # `intervals_s`, at least one, inside `duration_s`
    option: bool = False  # `option`, the letter of one of `options`
    record: type[BaseModel] | None = None  # `truth`, an object of this class; frozen and strict

    def is_in(self, sample: Sample) -> bool:
        """Return whether the sample has every field that an answer is scored by."""
        return (
            (bool(sample.intervals_s) or not self.intervals)
            and (bool(sample.option) or not self.option)
            and (self.record is None or isinstance(sample.truth, self.record))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of `megatron_vrl.tasks.TASKS`."""

    name: str
    truth: Truth
    needs_one_video: bool = False  # refuse a sample without a video or with several

    question: Callable[[Sample], str]
    """Text of the user turn. MEDIA_PLACEs in the sample's texts stay in it; without one, videos
    and images come before it."""
    target: Callable[[Sample], str]
    """Ideal response, without the stop token; the warm-up imitates it."""
    parse: Callable[[str, Sample], Parsed]
    """Reads a response. It never raises: `Parsed.failure` says what could not be read."""

    components: Mapping[str, Component]
    """Reward components that are always computed, in the order in which they are added."""
    default_weights: Mapping[str, float]
    """Weights of the components where `rewards.weights` gives none."""
    correctness: Mapping[str, Literal["binary", "graded"]]
    """Components that score what is answered, not how it is written: 0 or 1, or anything between.
    Data selection looks at their spread, and `length` at whether they exceed 0.1."""

    metrics: Callable[[Sequence[Sample], Sequence[Parsed]], dict[str, float]]
    """Evaluation metrics of at least one parsed answer; one answer for each sample."""
    titles: Mapping[str, tuple[str, str]]
    """Metric -> (title, unit) in tables and charts; unit "%" shows a fraction as a percentage."""
    baselines: Callable[[Sequence[Sample]], dict[str, list[str]]]
    """Label -> one response for each sample, from answers that look at neither video nor question.
    "best constant" is always among the labels."""

    optional_components: Mapping[str, Component] = field(default_factory=dict)
    """Components that are computed only if `rewards.weights` names them."""
    temporal_r1_question: Callable[[Sample], str] | None = None
    """Wording released with Temporal-R1; None: the same question."""
    temporal_r1_components: Mapping[str, TextComponent] = field(default_factory=dict)
    """Released scores for `rewards.mode: temporal_r1`, named as `components`; {}: none exist."""
