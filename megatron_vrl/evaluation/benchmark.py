"""Grade predictions of a benchmark, without a model.

Predictions are lines {"id", "response"} from any model; evaluation/predict.py writes them. Lines of
a submission to QVHighlights and of a sample file of lmms-eval are read, too.
OUT/items.jsonl has a record of every question and OUT/summary.json the metrics.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import cut_to_video
from megatron_vrl.data.formats.training import read_whole
from megatron_vrl.errors import ConfigError, DataError, counted
from megatron_vrl.evaluation.average_precision import Window
from megatron_vrl.evaluation.lmms_eval import is_sample, prediction_of_sample, sample_rows
from megatron_vrl.evaluation.protocols import (
    BENCHMARKS,
    Item,
    Prediction,
    Protocol,
    judged,
    summary,
)
from megatron_vrl.storage.files import write_file
from megatron_vrl.tasks.multi_segment_grounding import MULTI_SEGMENT_GROUNDING
from megatron_vrl.types import Sample

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_WINDOWS: TypeAdapter[list[Window]] = TypeAdapter(
    Annotated[list[tuple[Number, Number, Number]], Field(min_length=1)]
)


def questions(
    name: str, annotations: str, videos: str, protocol: Protocol, multi_segment: bool = False
) -> list[Sample]:
    """Return every question of a file, with unique ids.

    The true intervals are as published; the protocol `clipped` cuts them to the video.
    `multi_segment` asks the questions of temporal grounding for every interval.
    """
    source = Source.model_validate(
        {
            "json_path": annotations,
            "data_folder": videos,
            "format": BENCHMARKS[name].form,
            "multi_segment": multi_segment,
        }
    )
    samples = read_whole(source)
    if not samples:
        raise DataError(f"{annotations} holds no questions; give the annotations of {name}.")
    if multi_segment and all(sample.task != MULTI_SEGMENT_GROUNDING.name for sample in samples):
        raise ConfigError(
            f"--multi-segment: {name} has no questions of temporal grounding; leave it out."
        )
    seen: Counter[str] = Counter()
    unique = []
    for sample in samples:
        seen[sample.id] += 1
        copy = seen[sample.id]
        sample = sample if copy == 1 else replace(sample, id=f"{sample.id}#{copy}")
        unique.append(cut_to_video(sample) if protocol == "clipped" else sample)
    return unique


def read_predictions(path: Path, samples: Sequence[Sample]) -> list[Prediction]:
    """Read lines {"id", "response"} in any order. Raises DataError naming the line."""
    known = {sample.id for sample in samples}
    predictions: dict[str, Prediction] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 may be in a response
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The predictions {path} cannot be read: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            origin = f"{path}, line {number}"
            row = _row(line, origin)
            if is_sample(row):
                prediction = prediction_of_sample(row, samples, origin)
            else:
                prediction = prediction_of(row, origin)
            if prediction.id not in known:
                raise DataError(
                    f"{path}, line {number}: no question has the id {prediction.id!r}; an id is "
                    f"like {samples[0].id!r}."
                )
            if prediction.id in predictions:
                raise DataError(f"{path}, line {number}: {prediction.id!r} is there twice.")
            predictions[prediction.id] = prediction
    return list(predictions.values())


def items_of(
    name: str,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    protocol: Protocol,
) -> list[Item]:
    """Return the graded item of each question of benchmark `name`, in the order of `samples`."""
    by_id = {prediction.id: prediction for prediction in predictions}
    missing = Prediction(id="", response=None)
    return [
        judged(sample, by_id.get(sample.id, missing), BENCHMARKS[name], protocol)
        for sample in samples
    ]


def write_results(out: Path, name: str, protocol: str, items: Sequence[Item]) -> dict[str, Any]:
    """Write OUT/items.jsonl and OUT/summary.json, and return the content of the summary."""
    results = {"benchmark": name, "protocol": protocol, **summary(BENCHMARKS[name], items)}
    out.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(item.record(), allow_nan=False) for item in items)
    write_file(out / "items.jsonl", "".join(row + "\n" for row in rows))
    write_file(out / "summary.json", json.dumps(results, indent=1) + "\n")
    return results


def write_lmms_samples(path: Path, name: str, items: Sequence[Item]) -> None:
    """Write the items as a sample file of lmms-eval, with the benchmark's first metric as score."""
    rows = sample_rows(items, BENCHMARKS[name].metrics[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def table(results: dict[str, Any]) -> str:
    """Return the metrics as text, in percent, with 95 % intervals over questions."""
    failures = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in results["failures"].items())
    lines = [
        f"{results['benchmark']}, protocol {results['protocol']}: "
        f"{counted(results['num_questions'], 'question')}, {results['answered']} answered "
        f"({failures})",
    ]
    for name, metric in results["metrics"].items():
        bounds = (
            f"  {100 * metric['low']:6.2f} - {100 * metric['high']:.2f}" if "low" in metric else ""
        )
        lines.append(f"  {name:16} {100 * metric['value']:6.2f}{bounds}")
    for label, row in results["labels"].items():
        metric, value = next(iter(row.items()))
        lines.append(f"    {label:40} {metric} {100 * value:6.2f}  of {row['num_questions']}")
    return "\n".join(lines)


def prediction_of(row: Any, origin: str) -> Prediction:
    """Return the prediction in a row. Raises DataError, which begins with `origin`."""
    if isinstance(row, dict) and "pred_relevant_windows" in row:
        windows = _windows(row["pred_relevant_windows"], origin)
        row = {"id": row.get("qid"), "response": None}
    else:
        windows = ()
    if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
        raise DataError(f'{origin}: no field \'id\'; write {{"id", "response"}}.')
    problem = row.get("problem", "")
    if not isinstance(row.get("response"), str) and not problem and not windows:
        raise DataError(f"{origin}: field 'response' is {row.get('response')!r:.40}, not a text.")
    return Prediction(
        id=str(row["id"]),
        response=row.get("response"),
        cut_off=row.get("finish") == "length",
        problem=str(problem),
        windows=windows,
    )


def _row(line: str, origin: str) -> Any:
    """Parse one line. Raises DataError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is not JSON ({error}); write one object a line.") from None


def _windows(value: Any, origin: str) -> tuple[Window, ...]:
    """Return a list of [start, end, score]. Raises DataError."""
    try:
        return tuple(_WINDOWS.validate_python(value))
    except ValidationError:
        raise DataError(
            f"{origin}: field 'pred_relevant_windows' is {value!r:.60}, expected at least one "
            "[start, end, score] of finite numbers."
        ) from None
