"""Annotation files in their published forms -> VideoSample. A new form is one row in `READERS`.

charades_sta    {video id: {duration, timestamps [[s, e], ...], sentences}}: Charades-STA and
                ActivityNet Captions; a video id without an ending is an .mp4
next_gqa        [{id, video, question, options, duration, glue [[s, e], ...], answer "(C)"}], or
                the authors' CSV, see megatron_vrl/data/nextgqa_csv.py
multiple_choice the same without `glue`
temporal_r1     [{dataset, video, problem, solution [s, e] in [0, 1], video_length}], as released
                with Temporal-R1, where the tag "charades_train" comes without `video_length`

The forms of further benchmarks are in megatron_vrl/data/benchmarks.py. .json, and .jsonl for the
lists. Any record may also have `clip` [s, e], the part of its video that is shown; its other times
are the video's, and those of its samples count from s. Fields not named here are passed over. No
video is touched, except where the record keeps no duration. `read` cuts intervals at the video's
ends (in Charades-STA many run past them). A question that is then left without an interval, or that
has no text or no options, is left out and warned of, since the published files hold a few. Anything
else that is wrong is refused.
"""

import gc
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.data.benchmarks import BENCHMARK_READERS
from megatron_vrl.data.nextgqa_csv import load_csv
from megatron_vrl.data.records import (
    HeaderDuration,
    Options,
    Reader,
    Record,
    Seconds,
    Span,
    choice,
    clipped,
    spans,
    video_file,
    video_path,
)
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import can_be_asked
from megatron_vrl.tasks.temporal_grounding import QUESTION
from megatron_vrl.types import Interval, VideoSample

logger = logging.getLogger(__name__)


class CharadesSta(Record):
    duration: Seconds
    timestamps: list[Span]
    sentences: list[str]


class MultipleChoice(Record):
    id: str
    video: str
    question: str
    options: Options
    duration: Seconds
    answer: str
    type: str = ""  # the kind of question


class NextGqa(MultipleChoice):
    glue: list[Span]


class TemporalR1(Record):
    dataset: str
    video: str
    problem: str
    solution: Span
    video_length: Seconds | None = None


def read(source: Source, header_duration_s: HeaderDuration | None = None) -> list[VideoSample]:
    """All samples of one source that can be asked, in the file's order, with their intervals cut.

    `header_duration_s` reads a video's own duration, for records that keep none.
    Raises DataError naming file, record, field, the value seen and what is expected.
    """
    kept: list[VideoSample] = []
    left_out: list[VideoSample] = []
    for sample in read_whole(source, header_duration_s):
        cut = within(sample)
        (kept if can_be_asked(cut) else left_out).append(cut)
    if left_out:
        logger.warning(
            f"{source.json_path}: {len(left_out)} of {len(kept) + len(left_out)} questions have no "
            "text, no interval within the video or no options and are left out, first "
            f"{left_out[0].id!r}."
        )
    return kept


def read_whole(
    source: Source, header_duration_s: HeaderDuration | None = None
) -> list[VideoSample]:
    """Every question of the file, with its intervals as published: for an evaluation."""
    reader = READERS[source.format]
    with _without_collector():
        records = _validated(reader.form, load_records(source), source.json_path)
        numbered = records.items() if isinstance(records, dict) else enumerate(records)
        return list(reader.samples(numbered, source, header_duration_s))


def load_records(source: Source) -> Any:
    """The annotations' JSON: of a form with several files, by their names."""
    if READERS[source.format].by_file:
        return _by_file(source.json_path)
    if source.format == "next_gqa" and source.json_path.endswith(".csv"):
        return load_csv(source.json_path)
    return _load(source.json_path)


def within(sample: VideoSample) -> VideoSample:
    """Its intervals cut to the video; what is then empty is gone."""
    cut = _within(sample.intervals_s, sample.duration_s)
    return sample if cut == sample.intervals_s else replace(sample, intervals_s=cut)


def read_record(
    record: Any, number: int, source: Source, header_duration_s: HeaderDuration | None = None
) -> VideoSample | None:
    """The sample of one record of a list, its `number` counted from 0; None if it cannot be asked.

    Raises DataError as `read` does, and whatever `header_duration_s` raises.
    """
    [sample] = samples_of(record, number, source, header_duration_s)
    return sample if can_be_asked(sample) else None


def samples_of(
    record: Any, key: str | int, source: Source, header_duration_s: HeaderDuration | None = None
) -> list[VideoSample]:
    """All of one record, also those that cannot be asked; its key, or its number in a list."""
    reader = READERS[source.format]
    if isinstance(key, str):
        checked = _validated(reader.form, {key: record}, source.json_path)[key]
    else:
        [checked] = _validated(reader.form, [record], source.json_path, key)
    return [
        within(sample) for sample in reader.samples([(key, checked)], source, header_duration_s)
    ]


def charades_sta(
    records: Iterable[tuple[str, CharadesSta]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    for video, record in records:
        if len(record.timestamps) != len(record.sentences):
            raise DataError(
                f"{source.json_path}: record {video!r} has {len(record.timestamps)} timestamps and "
                f"{len(record.sentences)} sentences; expected one sentence for each."
            )
        path = video_path(video_file(video), source, video)
        for index, (span, sentence) in enumerate(
            zip(record.timestamps, record.sentences, strict=True)
        ):
            sample = VideoSample(
                id=f"{video}/{index}",
                task="temporal_grounding",
                video=path,
                duration_s=record.duration,
                query=sentence.strip(),
                rationale=sentence.strip(),
                intervals_s=spans([span]),
                options=(),
                option="",
            )
            yield clipped(sample, record, source)


def multiple_choice(
    records: Iterable[tuple[int, MultipleChoice]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    for _, record in records:
        yield clipped(_choice(record, source), record, source)


def next_gqa(
    records: Iterable[tuple[int, NextGqa]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    for _, record in records:
        sample = _choice(record, source, task="grounded_qa", intervals_s=spans(record.glue))
        yield clipped(sample, record, source)


def temporal_r1(
    records: Iterable[tuple[int, TemporalR1]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    header_s: dict[str, float] = {}  # one video has several questions
    before, after = QUESTION.split("{query}")
    for index, record in records:
        path = video_path(record.video, source, index)
        duration_s = record.video_length
        if duration_s is None:
            if record.dataset != "charades_train" or header_duration_s is None:
                raise DataError(
                    f"{source.json_path}: record {index} has no field 'video_length' (seconds); "
                    f"it is read from the video only for the training set tagged 'charades_train', "
                    f"this record's tag is {record.dataset!r}."
                )
            if path not in header_s:
                header_s[path] = header_duration_s(path)
            duration_s = header_s[path]
        # the question around the query is asked again by the task
        query = record.problem.strip().removeprefix(before).removesuffix(after).strip()
        sample = VideoSample(
            id=f"{record.video}/{index}",
            task="temporal_grounding",
            video=path,
            duration_s=duration_s,
            query=query,
            rationale=query,
            intervals_s=spans([[t * duration_s for t in record.solution]]),
            options=(),
            option="",
        )
        yield clipped(sample, record, source)


READERS: dict[str, Reader] = {
    "charades_sta": Reader(
        form=TypeAdapter(dict[str, CharadesSta]), samples=charades_sta, is_list=False
    ),
    "next_gqa": Reader(form=TypeAdapter(list[NextGqa]), samples=next_gqa, is_list=True),
    "multiple_choice": Reader(
        form=TypeAdapter(list[MultipleChoice]), samples=multiple_choice, is_list=True
    ),
    "temporal_r1": Reader(form=TypeAdapter(list[TemporalR1]), samples=temporal_r1, is_list=True),
    **BENCHMARK_READERS,
}


def _choice(
    record: MultipleChoice,
    source: Source,
    task: str = "multiple_choice",
    intervals_s: tuple[Interval, ...] = (),
) -> VideoSample:
    return choice(
        source,
        record.id,
        task=task,
        video=record.video,
        duration_s=record.duration,
        question=record.question,
        options=record.options,
        answer=record.answer,
        intervals_s=intervals_s,
        labels=(f"type/{record.type}",) if record.type else (),
    )


def _within(intervals_s: Iterable[Interval], duration_s: float) -> tuple[Interval, ...]:
    cut = [(max(start_s, 0.0), min(end_s, duration_s)) for start_s, end_s in intervals_s]
    return tuple((start_s, end_s) for start_s, end_s in cut if start_s < end_s)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Records hold no cycles; the collector would only walk half a million of them again and
    again, which takes most of the time of reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _by_file(json_path: str) -> Any:
    """{name without ending: content} of a folder's .json files, or of the one file."""
    path = Path(json_path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"The folder {json_path} holds no .json file; give the annotations.")
    return {file.stem: _load(str(file)) for file in files}


def _load(json_path: str) -> Any:
    try:
        text = Path(json_path).read_text(encoding="utf-8")
        if json_path.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text, object_pairs_hook=_unique_keys)
    except OSError as error:
        raise DataError(f"Cannot read the annotations {json_path}: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{json_path} is not JSON: {error}.") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in record if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return record


def _validated(form: TypeAdapter[Any], records: Any, json_path: str, first: int = 0) -> Any:
    """`records` in their form; a list's are counted from `first` in messages."""
    try:
        return form.validate_python(records)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    if not wrong["loc"]:
        raise DataError(
            f"{json_path} holds a {type(records).__name__}: {wrong['msg']}. "
            f"The forms are described in megatron_vrl/data/readers.py."
        )
    record, *field = wrong["loc"]
    if isinstance(record, int):
        record += first
    where = f"{json_path}: record {record!r}: field {'.'.join(map(str, field))!r}"
    if wrong["type"] == "missing":
        raise DataError(f"{where} is missing.")
    raise DataError(f"{where} is {wrong['input']!r:.80}, refused: {wrong['msg']}.")
