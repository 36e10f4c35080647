"""One stored response and its truth -> score: what tools/grade.py does with a line.

The same parser and parts as in training, in either mode. `failure` says why a response could not
be read; a readable wrong answer has none. Left out: parts that need more than the text of the
response (its length in tokens, a user's own function).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vrl.config import Rewards
from megatron_vrl.errors import DataError
from megatron_vrl.rewards import TEMPORAL_R1_COMPONENTS, score, temporal_r1, weights_of
from megatron_vrl.tasks import TASKS, Parsed
from megatron_vrl.tasks.answer import read_option
from megatron_vrl.types import Interval, VideoSample

ANY_LETTER = ("",) * 26  # where a line does not tell the options' texts, any letter names one

Time = Annotated[float, Field(allow_inf_nan=False)]
Span = Annotated[list[Time], Field(min_length=2, max_length=2)]


class Line(BaseModel):
    """What a line may hold; which fields it must hold depends on the task."""

    model_config = ConfigDict(strict=True)

    id: str | int
    response: str
    duration_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    intervals_s: Annotated[list[Span], Field(min_length=1)] | None = None
    option: str | None = None
    options: Annotated[list[str], Field(min_length=2, max_length=26)] | None = None
    """Texts of the options. Without them an option is read by its letter alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    task: str  # a row of `megatron_vrl.tasks.TASKS`
    mode: Literal["strict", "temporal_r1"]
    rewards: Rewards  # its weights count, its mode does not

    def grade(self, fields: Any) -> dict[str, Any]:
        """The row {id, score, parts, parsed, failure}, ready for JSON.

        Raises DataError naming the field that is missing or refused.
        """
        line = _checked(fields, self.task)
        sample = _sample(line, self.task, self.mode)
        parts, total = score(sample, line.response, self.mode, weights_of(self.rewards)[self.task])
        parsed = self._parsed(sample, line.response)
        return {
            "id": line.id,
            "score": float(total),
            "parts": {name: float(value) for name, value in parts.items()},
            "parsed": _shown(parsed, TASKS[self.task].parts),
            "failure": parsed.failure or None,
        }

    def _parsed(self, sample: VideoSample, response: str) -> Parsed:
        """What the mode's own parser reads."""
        if self.mode == "strict" or self.task not in TEMPORAL_R1_COMPONENTS:
            return TASKS[self.task].parse(response, sample)
        interval_s, failure = temporal_r1.read_interval(response)
        if interval_s is not None and not all(map(math.isfinite, interval_s)):
            return Parsed(failure=f"the times {interval_s} are not finite")
        return Parsed(interval_s=interval_s, failure=failure)


def _checked(fields: Any, task: str) -> Line:
    if not isinstance(fields, dict):
        raise DataError(f"holds {type(fields).__name__}, expected an object")
    try:
        line = Line.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise DataError(f"field {field!r} is missing") from None
        raise DataError(
            f"field {field!r} is {first['input']!r:.80}, refused: {first['msg']}"
        ) from None
    parts = TASKS[task].parts
    needed = ["duration_s", "intervals_s"] if "temporal_iou" in parts else []
    needed += ["option"] if "accuracy" in parts else []
    for field in needed:
        if fields.get(field) is None:
            raise DataError(f"field {field!r} is missing, which {task} needs")
    return line


def _sample(line: Line, task: str, mode: str) -> VideoSample:
    options = tuple(line.options or ANY_LETTER)
    option, failure = read_option(line.option, options) if line.option is not None else ("", "")
    if failure:
        raise DataError(f"field 'option' is {line.option!r:.80}, expected the letter of an option")
    duration_s = line.duration_s or 0.0
    return VideoSample(
        id=str(line.id),
        task=task,
        video="",
        duration_s=duration_s,
        query="",
        rationale="",
        intervals_s=_truths(line.intervals_s or [], duration_s, mode),
        options=options,
        option=option,
    )


def _truths(spans: Sequence[list[float]], duration_s: float, mode: str) -> tuple[Interval, ...]:
    """As the readers cut them in strict mode; in seed mode as they stand."""
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


def _shown(parsed: Parsed, parts: Sequence[str]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if "temporal_iou" in parts:
        shown["interval_s"] = list(parsed.interval_s) if parsed.interval_s else None
    if "accuracy" in parts:
        shown["option"] = parsed.option or None
    return shown
