"""Sample files of lmms-eval (`--log_samples`, DATE_samples_TASK.jsonl), read and written.

A line has `doc_id` (index of the question in its split), `input` (text of the question), `target`
(text of the truth), `filtered_resps` (scored text), `resps` (text with thinking; left out if equal)
and the metrics. Source: EvolvingLMMs-Lab/lmms-eval 75571cf, docs/getting-started/commands.md,
lmms_eval/loggers/evaluation_tracker.py.

A `doc_id` is an index in the released order. A `target` that is not the truth of that question
shows another order and is refused. `resps` is preferred, since the strict parser needs the answer
block. Not written: `doc_hash`, the hash of lmms-eval's own record, and whether an answer was cut.
"""

import re
from collections.abc import Sequence
from typing import Any

from megatron_vrl.errors import DataError, counted
from megatron_vrl.evaluation.protocols import Item, Prediction
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.answer import read_option
from megatron_vrl.types import Sample

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOLERANCE_S = 0.01  # of a target's times


def is_sample(row: Any) -> bool:
    """Return whether a line of predictions is one of lmms-eval's."""
    return isinstance(row, dict) and "doc_id" in row


def prediction_of_sample(row: dict[str, Any], samples: Sequence[Sample], origin: str) -> Prediction:
    """Return the prediction of a line. Raises DataError, which begins with `origin`."""
    index = row["doc_id"]
    if not isinstance(index, int) or not 0 <= index < len(samples):
        raise DataError(
            f"{origin}: field 'doc_id' is {index!r:.40}, expected the index of one of "
            f"{counted(len(samples), 'question')}; give the annotations of the same split."
        )
    sample, target = samples[index], row.get("target")
    if not _is_truth(target, sample):
        raise DataError(
            f"{origin}: field 'target' is {target!r:.40}, which is not the truth of question "
            f"{sample.id!r}, number {index} of the annotations: give the same split in the same "
            "order."
        )
    response = _first_text(row["resps"] if "resps" in row else row.get("filtered_resps"))
    if response is None:
        raise DataError(f"{origin}: neither 'resps' nor 'filtered_resps' holds a text.")
    return Prediction(id=sample.id, response=response)


def sample_rows(items: Sequence[Item], metric: str) -> list[dict[str, Any]]:
    """Return one line of a sample file for each item; `score` is the value of `metric`."""
    return [
        {
            "doc_id": index,
            "input": TASKS[item.sample.task].question(item.sample),
            "target": _target(item.sample),
            "filtered_resps": [item.response],
            "score": item.values.get(metric),
            **item.values,
        }
        for index, item in enumerate(items)
    ]


def _target(sample: Sample) -> str:
    """Return the truth as text: the letter, else the first interval."""
    return sample.option or (str(list(sample.intervals_s[0])) if sample.intervals_s else "")


def _is_truth(target: Any, sample: Sample) -> bool:
    """Return whether `target` is the option or a true interval of a sample, or neither kind."""
    if sample.option:
        text = target if isinstance(target, str) else ""
        return read_option(text, sample.options)[0] == sample.option or text == sample.option
    times = [float(number) for number in _NUMBER.findall(str(target))[:2]]
    if not sample.intervals_s or len(times) < 2:
        return True
    cut = [max(times[0], 0.0), min(times[1], sample.duration_s)]  # as the protocol `clipped` does
    return any(
        abs(pair[0] - start) <= TOLERANCE_S and abs(pair[1] - end) <= TOLERANCE_S
        for start, end in sample.intervals_s
        for pair in (times, cut)
    )


def _first_text(value: Any) -> str | None:
    """Return the first text of a text or of nested lists of texts; None if there is none."""
    while isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None
