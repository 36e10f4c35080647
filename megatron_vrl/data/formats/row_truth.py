"""Right answer of a row, for any task.

  short_answer               a text or a number. A text with an answer block or a box, such as a
                             worked solution, is read as an answer of the model is read
  temporal_grounding,        an object {"duration": seconds, "intervals": [[s, e], ...]}
  multi_segment_grounding
  multiple_choice            an object {"options": [...], "answer": "B"}
  grounded_qa                an object with the fields of both
  a task with its own truth  an object with the fields of its `Truth.record`

An object may be written as JSON in a text.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.data.formats.json_files import parse
from megatron_vrl.data.formats.records import Options, Seconds, Span, option_texts, to_intervals
from megatron_vrl.data.formats.validation import short_repr
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.tasks import TASKS, Task
from megatron_vrl.tasks.answer import BOX, read_option
from megatron_vrl.tasks.short_answer import ShortAnswer, read_answer
from megatron_vrl.types import Interval


class GroundTruth(BaseModel):
    """Fields of the truth of the tasks whose truth is intervals or an option."""

    model_config = ConfigDict(strict=True)

    duration: Seconds | None = None
    intervals: Annotated[list[Span], Field(min_length=1)] | None = None
    options: Options | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTruth:
    """Fields of a sample that hold the right answer."""

    duration_s: float = 0.0
    intervals_s: tuple[Interval, ...] = ()
    options: tuple[str, ...] = ()
    option: str = ""
    truth: Any = None


def task_of(source: Source) -> Task:
    """Return the task of the source's rows. Raises ConfigError for an unknown one."""
    if source.task not in TASKS:
        raise ConfigError(
            f"The source {source.json_path} has the task {source.task!r}, which is not known; "
            f"known: {', '.join(TASKS)}."
        )
    return TASKS[source.task]


def row_truth(value: Any, task: Task, where: str) -> RowTruth:
    """Return the truth in `value`. Raises DataError beginning with `where`."""
    if task.truth.record is ShortAnswer:
        return RowTruth(truth=ShortAnswer(answer=_text(value, where)))
    fields = _object(value, where)
    try:
        if task.truth.record:
            return RowTruth(truth=task.truth.record.model_validate(fields))
        checked = GroundTruth.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field = ".".join(map(str, wrong["loc"]))
        raise DataError(
            f"{where}: field {field!r} is {short_repr(wrong['input'])}, refused: {wrong['msg']}."
            if wrong["type"] != "missing"
            else f"{where}: field {field!r} is missing."
        ) from None
    needed = ["duration", "intervals"] * task.truth.intervals + ["options", "answer"] * (
        task.truth.option
    )
    for name in needed:
        if fields.get(name) is None:
            raise DataError(f"{where}: field {name!r} is missing, which {task.name} needs.")
    return _with_option(checked, where)


def _with_option(checked: GroundTruth, where: str) -> RowTruth:
    """Return the truth, with the option that `answer` names."""
    options = option_texts(checked.options or ())
    option, failure = read_option(checked.answer, options) if options else ("", "")
    if failure:
        raise DataError(
            f"{where}: field 'answer' is {short_repr(checked.answer)}, expected the letter of one "
            f"of {len(options)} options."
        )
    return RowTruth(
        duration_s=checked.duration or 0.0,
        intervals_s=to_intervals(checked.intervals or ()),
        options=options,
        option=option,
    )


def _text(value: Any, where: str) -> str:
    """Return the short answer in a text or a number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return f"{value}"
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} is {short_repr(value)}, expected a text or a number.")
    if "<answer>" not in value and BOX not in value:
        return value
    text, failure = read_answer(value)
    if failure:
        raise DataError(f"{where} is {short_repr(value)}: {failure}.")
    return text


def _object(value: Any, where: str) -> dict[str, Any]:
    """Return the object in `value`, which may be JSON in a text.

    Fields without a value are left out, since the rows of a table all have the same fields.
    """
    parsed = value
    if isinstance(value, str):
        try:
            parsed = parse(value.encode())
        except ValueError:
            parsed = value
    if not isinstance(parsed, dict):
        raise DataError(f"{where} is {short_repr(value)}, expected an object, or one as JSON.")
    return {name: part for name, part in parsed.items() if part is not None}
