"""Grade one stored response against its truth: what tools/grade.py does with a line.

Parser and reward components are those of training, in every mode. `failure` says why a response
could not be read; a readable wrong answer has none. Left out: components that need more than the
text of the response, such as `length` and a user's own functions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vrl.config import RewardMode
from megatron_vrl.errors import DataError
from megatron_vrl.rewards import temporal_r1
from megatron_vrl.rewards.score import score
from megatron_vrl.tasks import TASKS, Task, Truth
from megatron_vrl.tasks.answer import read_option
from megatron_vrl.types import Interval, Parsed, Sample, VideoClip

ANY_LETTER = ("",) * 26  # options of a line without `options`: any letter names one

Model = TypeVar("Model", bound=BaseModel)
Time = Annotated[float, Field(allow_inf_nan=False)]
Span = Annotated[list[Time], Field(min_length=2, max_length=2)]


class Line(BaseModel):
    """Fields of a line; its task decides which of them it must have."""

    model_config = ConfigDict(strict=True)

    id: str | int
    response: str
    duration_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    intervals_s: Annotated[list[Span], Field(min_length=1)] | None = None
    option: str | None = None
    options: Annotated[list[str], Field(min_length=2, max_length=26)] | None = None
    """Texts of the options. Without them an option is read by its letter alone."""
    truth: dict[str, Any] | None = None
    """Right answer of a task with a truth of its own: the fields of its `Truth.record`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """Grades the responses to one task."""

    task: str  # a row of `megatron_vrl.tasks.TASKS`
    mode: RewardMode
    weights: Mapping[str, float]  # component -> weight in the score

    def grade(self, fields: Any) -> dict[str, Any]:
        """Return the row {id, score, parts, parsed, failure}, ready for JSON.

        `parts` are the reward components. Raises DataError naming the field that is missing or
        refused.
        """
        task = TASKS[self.task]
        line = _checked(fields, task)
        sample = _sample(line, task, self.mode)
        components, total = score(sample, line.response, self.mode, self.weights)
        parsed = self._parsed(sample, line.response)
        return {
            "id": line.id,
            "score": float(total),
            "parts": {name: float(value) for name, value in components.items()},
            "parsed": _shown(parsed, task.truth),
            "failure": parsed.failure or None,
        }

    def _parsed(self, sample: Sample, response: str) -> Parsed:
        """Return the answer as the parser of the mode reads it."""
        if self.mode != "temporal_r1" or not TASKS[self.task].temporal_r1_components:
            return TASKS[self.task].parse(response, sample)
        interval_s, failure = temporal_r1.read_interval(response)
        if interval_s is not None and not all(map(math.isfinite, interval_s)):
            return Parsed(failure=f"the times {interval_s} are not finite")
        return Parsed(interval_s=interval_s, failure=failure)


def _checked(fields: Any, task: Task) -> Line:
    """Return a line whose fields have the right types, with all that the task needs."""
    if not isinstance(fields, dict):
        raise DataError(f"holds {type(fields).__name__}, expected an object")
    line = _validated(Line, fields)
    needed = ["duration_s", "intervals_s"] if task.truth.intervals else []
    needed += ["option"] if task.truth.option else []
    needed += ["truth"] if task.truth.record else []
    for field in needed:
        if fields.get(field) is None:
            raise DataError(f"field {field!r} is missing, which {task.name} needs")
    return line


def _validated(model: type[Model], fields: dict[str, Any], within: str = "") -> Model:
    """Return `fields` as `model`; `within` is the name before a field's in the DataError."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = within + ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise DataError(f"field {field!r} is missing")
    raise DataError(f"field {field!r} is {first['input']!r:.80}, refused: {first['msg']}")


def _sample(line: Line, task: Task, mode: str) -> Sample:
    """Return the line as a sample with a truth and without a question."""
    options = tuple(line.options or ANY_LETTER)
    option, failure = read_option(line.option, options) if line.option is not None else ("", "")
    if failure:
        raise DataError(f"field 'option' is {line.option!r:.80}, expected the letter of an option")
    duration_s = line.duration_s or 0.0
    record = task.truth.record
    return Sample(
        id=str(line.id),
        task=task.name,
        media=(VideoClip(""),),
        duration_s=duration_s,
        query="",
        rationale="",
        intervals_s=_truths(line.intervals_s or [], duration_s, mode),
        options=options,
        option=option,
        truth=record and _validated(record, line.truth or {}, "truth."),
    )


def _truths(spans: Sequence[list[float]], duration_s: float, mode: str) -> tuple[Interval, ...]:
    """Return the true intervals: unchanged in mode temporal_r1, else cut to the video."""
    if mode == "temporal_r1":
        return tuple((start_s, end_s) for start_s, end_s in spans)
    cut = [(max(start_s, 0.0), min(end_s, duration_s)) for start_s, end_s in spans]
    kept = tuple((start_s, end_s) for start_s, end_s in cut if start_s < end_s)
    if spans and not kept:
        raise DataError(
            f"field 'intervals_s' is {list(spans)!r:.80}, expected a start before an end within "
            f"the {duration_s:g} s of the video"
        )
    return kept


def _shown(parsed: Parsed, truth: Truth) -> dict[str, Any]:
    """Return what was read, under the names of the kinds of truth that the task has."""
    shown: dict[str, Any] = {}
    if truth.intervals:
        shown["interval_s"] = list(parsed.interval_s) if parsed.interval_s else None
    if parsed.intervals_s:
        shown = {"intervals_s": list(map(list, parsed.intervals_s))}
    if truth.option:
        shown["option"] = parsed.option or None
    if truth.record:
        shown["value"] = parsed.value
    return shown
