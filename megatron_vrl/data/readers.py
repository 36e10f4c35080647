"""Annotation files in their published forms -> VideoSample. A new form is one row in `READERS`.

charades_sta    {video id: {duration, timestamps [[s, e], ...], sentences}}: Charades-STA and
                ActivityNet Captions; a video id without an ending is an .mp4
next_gqa        [{id, video, question, options, duration, glue [[s, e], ...], answer "(C)"}]
multiple_choice the same without `glue`
temporal_r1     [{dataset, video, problem, solution [s, e] in [0, 1], video_length}], as released
                with Temporal-R1, where the tag "charades_train" comes without `video_length`

.json, and .jsonl for the lists. Any record may also have `clip` [s, e], the part of its video that
is shown; its other times are the video's, and those of its samples count from s. Fields not named
here are passed over. No video is touched, except where the record keeps no duration. Intervals are
cut at the video's ends (in Charades-STA many run past them). A question that is then left without
an interval, or that has no text, is left out and warned of, since the published files hold a few.
Anything else that is wrong is refused.
"""

import gc
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.errors import DataError
from megatron_vrl.tasks.answer import read_option
from megatron_vrl.tasks.temporal_grounding import QUESTION
from megatron_vrl.types import Interval, VideoSample

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
MAX_OPTIONS = 26  # letters A to Z

HeaderDuration = Callable[[str], float]  # path of a video -> its own duration, seconds

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Time = Annotated[float, Field(allow_inf_nan=False)]
Span = Annotated[list[Time], Field(min_length=2, max_length=2)]


class Record(BaseModel):
    model_config = ConfigDict(strict=True)

    clip: Span | None = None


class CharadesSta(Record):
    duration: Seconds
    timestamps: list[Span]
    sentences: list[str]


class MultipleChoice(Record):
    id: str
    video: str
    question: str
    options: Annotated[list[str], Field(min_length=2, max_length=MAX_OPTIONS)]
    duration: Seconds
    answer: str


class NextGqa(MultipleChoice):
    glue: list[Span]


class TemporalR1(Record):
    dataset: str
    video: str
    problem: str
    solution: Span
    video_length: Seconds | None = None


def read(source: Source, header_duration_s: HeaderDuration | None = None) -> list[VideoSample]:
    """All samples of one source, in the file's order.

    `header_duration_s` reads a video's own duration, for records that keep none.
    Raises DataError naming file, record, field, the value seen and what is expected.
    """
    reader = READERS[source.format]
    kept: list[VideoSample] = []
    left_out: list[VideoSample] = []
    with _without_collector():
        records = _validated(reader.form, _load(source.json_path), source.json_path)
        numbered = records.items() if isinstance(records, dict) else enumerate(records)
        for sample in reader.samples(numbered, source, header_duration_s):
            (kept if _is_usable(sample) else left_out).append(sample)
    if left_out:
        logger.warning(
            f"{source.json_path}: {len(left_out)} of {len(kept) + len(left_out)} questions have no "
            f"text or no interval within the video and are left out, first {left_out[0].id!r}."
        )
    return kept


def read_record(
    record: Any, number: int, source: Source, header_duration_s: HeaderDuration | None = None
) -> VideoSample | None:
    """The sample of one record of a list, its `number` counted from 0; None if it cannot be asked.

    Raises DataError as `read` does, and whatever `header_duration_s` raises.
    """
    [sample] = samples_of(record, number, source, header_duration_s)
    return sample if _is_usable(sample) else None


def samples_of(
    record: Any, key: str | int, source: Source, header_duration_s: HeaderDuration | None = None
) -> list[VideoSample]:
    """All of one record, also those that cannot be asked; its key, or its number in a list."""
    reader = READERS[source.format]
    if isinstance(key, str):
        checked = _validated(reader.form, {key: record}, source.json_path)[key]
    else:
        [checked] = _validated(reader.form, [record], source.json_path, key)
    return list(reader.samples([(key, checked)], source, header_duration_s))


def _is_usable(sample: VideoSample) -> bool:
    grounded = sample.task != "multiple_choice"
    return bool(sample.query and (sample.intervals_s or not grounded))


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
        name = video if video.endswith(VIDEO_SUFFIXES) else f"{video}.mp4"
        path = _video_path(name, source, video)
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
                intervals_s=_within([span], record.duration),
                options=(),
                option="",
            )
            yield _clipped(sample, record, source)


def multiple_choice(
    records: Iterable[tuple[int, MultipleChoice]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    for _, record in records:
        yield _clipped(_choice(record, source, "multiple_choice", []), record, source)


def next_gqa(
    records: Iterable[tuple[int, NextGqa]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    for _, record in records:
        yield _clipped(_choice(record, source, "grounded_qa", record.glue), record, source)


def temporal_r1(
    records: Iterable[tuple[int, TemporalR1]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    header_s: dict[str, float] = {}  # one video has several questions
    before, after = QUESTION.split("{query}")
    for index, record in records:
        path = _video_path(record.video, source, index)
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
            intervals_s=_within([[t * duration_s for t in record.solution]], duration_s),
            options=(),
            option="",
        )
        yield _clipped(sample, record, source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    form: TypeAdapter[Any]  # of the whole file
    samples: Callable[[Any, Source, HeaderDuration | None], Iterator[VideoSample]]
    is_list: bool  # of one record for each sample


READERS: dict[str, Reader] = {
    "charades_sta": Reader(
        form=TypeAdapter(dict[str, CharadesSta]), samples=charades_sta, is_list=False
    ),
    "next_gqa": Reader(form=TypeAdapter(list[NextGqa]), samples=next_gqa, is_list=True),
    "multiple_choice": Reader(
        form=TypeAdapter(list[MultipleChoice]), samples=multiple_choice, is_list=True
    ),
    "temporal_r1": Reader(form=TypeAdapter(list[TemporalR1]), samples=temporal_r1, is_list=True),
}


def _choice(
    record: MultipleChoice, source: Source, task: str, spans: list[list[float]]
) -> VideoSample:
    options = tuple(re.sub(r"^\([A-Z]\)", "", option).strip() for option in record.options)
    option, failure = read_option(record.answer, options)
    if failure:
        raise DataError(
            f"{source.json_path}: record {record.id!r}: field 'answer' is {record.answer!r}, "
            f"expected the letter of one of {len(options)} options."
        )
    return VideoSample(
        id=record.id,
        task=task,
        video=_video_path(record.video, source, record.id),
        duration_s=record.duration,
        query=record.question.strip(),
        rationale=options[ord(option) - ord("A")],
        intervals_s=_within(spans, record.duration),
        options=options,
        option=option,
    )


def _clipped(sample: VideoSample, record: Record, source: Source) -> VideoSample:
    """The sample of a record with a `clip`, on the clip's own time."""
    if record.clip is None:
        return sample
    start_s, end_s = record.clip
    if not 0 <= start_s < end_s:
        raise DataError(
            f"{source.json_path}: record {sample.id!r}: field 'clip' is {record.clip}, expected "
            "[start, end] in seconds with 0 <= start < end."
        )
    duration_s = min(end_s, sample.duration_s) - start_s
    spans = [[s - start_s, e - start_s] for s, e in sample.intervals_s]
    return replace(
        sample,
        window_s=(start_s, end_s),
        duration_s=duration_s,
        intervals_s=_within(spans, duration_s),
    )


def _within(spans: Iterable[list[float]], duration_s: float) -> tuple[Interval, ...]:
    """Spans cut to [0, duration_s]; what is then empty is gone."""
    cut = [(max(start_s, 0.0), min(end_s, duration_s)) for start_s, end_s in spans]
    return tuple((start_s, end_s) for start_s, end_s in cut if start_s < end_s)


def _video_path(name: str, source: Source, record: str | int) -> str:
    """By the name alone, without looking at the disk: there may be half a million records."""
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside in (".", "..") or inside.startswith(f"..{os.sep}"):
        raise DataError(
            f"{source.json_path}: record {record!r}: video {name!r} is not inside the data folder "
            f"{source.data_folder!r}; expected a path relative to it."
        )
    return os.path.join(source.data_folder, inside)


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
