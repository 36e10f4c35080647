"""Readers of annotation formats: one file -> Samples.

To add a format, add one row to `READERS`.

  charades_sta    {video id: {duration, timestamps [[s, e], ...], sentences}}: Charades-STA and
                  ActivityNet Captions; a video id without a file ending means ID.mp4
  next_gqa        [{id, video, question, options, duration, glue [[s, e], ...], answer "(C)"}], or
                  the authors' CSV, see megatron_vrl/data/formats/nextgqa_csv.py
  multiple_choice next_gqa's records without `glue`
  temporal_r1     [{dataset, video, problem, solution [s, e] in [0, 1], video_length}], as released
                  with Temporal-R1, where records tagged "charades_train" have no `video_length`
  generic         [{id, task, video, duration, question, truth {...} or intervals [[s, e], ...]}]:
                  questions of any task without options, megatron_vrl/data/formats/generic.py

Other formats: benchmarks.py, moment_retrieval.py, long_videos.py, rows.py and llamafactory.py.

Rules for every format:

  - A record may have `clip` [s, e] in seconds: only that part of the video is shown. Other times of
    the record count from the start of the video, those of the resulting sample from s.
  - Unknown fields are ignored.
  - No video is opened, except to get the duration of a record that has none.
  - `read` cuts intervals to the video's duration (many intervals of Charades-STA exceed it).
  - `multi_segment` of a source turns temporal_grounding into multi_segment_grounding.
  - A question is skipped with a warning if it has no text, no options, or no interval left after
    cutting. The released files contain a few of these.
  - Any other error raises DataError, also a file of another format and a file without samples.

Example: a video of 30 s with the interval [25, 34] and `clip` [10, 30] gives a sample of 20 s with
the interval (15, 20).
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pydantic import TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.data.formats.benchmarks import BENCHMARK_READERS
from megatron_vrl.data.formats.generic import GENERIC_READER
from megatron_vrl.data.formats.json_files import (
    LocatedRecord,
    begins_a_list,
    is_lines,
    load,
    load_by_file,
    records,
    without_collector,
)
from megatron_vrl.data.formats.llamafactory import MEDIA_READERS
from megatron_vrl.data.formats.long_videos import LONG_VIDEO_READERS
from megatron_vrl.data.formats.moment_retrieval import MOMENT_READERS
from megatron_vrl.data.formats.nextgqa_csv import load_csv
from megatron_vrl.data.formats.records import (
    HeaderDuration,
    Name,
    Options,
    Reader,
    Record,
    Seconds,
    Span,
    apply_clip,
    choice_sample,
    cut_to_video,
    to_intervals,
    video_file,
    video_path,
)
from megatron_vrl.data.formats.tables import is_table, table_records
from megatron_vrl.data.formats.validation import (
    OtherFormat,
    WrongTopLevelType,
    matching_formats,
    validated,
)
from megatron_vrl.errors import DataError, counted
from megatron_vrl.tasks import can_be_asked
from megatron_vrl.tasks.temporal_grounding import QUESTION
from megatron_vrl.types import Interval, Sample, VideoClip

logger = logging.getLogger(__name__)


class CharadesSta(Record):
    duration: Seconds
    timestamps: list[Span]
    sentences: list[str]


class MultipleChoice(Record):
    id: Name
    video: str
    question: str
    options: Options
    duration: Seconds
    answer: str
    type: str = ""  # category of the question


class NextGqa(MultipleChoice):
    glue: list[Span]


class TemporalR1(Record):
    dataset: str
    video: str
    problem: str
    solution: Span
    video_length: Seconds | None = None


def read(source: Source, header_duration_s: HeaderDuration | None = None) -> list[Sample]:
    """Return the usable samples of one source in file order, with intervals cut to the video.

    `header_duration_s` reads the duration of a video file, for records without one. Raises
    DataError if a record is invalid (the message names file, record, field, value and the expected
    value) and if no sample is usable.
    """
    kept: list[Sample] = []
    left_out: list[Sample] = []
    for sample in read_whole(source, header_duration_s):
        cut = cut_to_video(sample)
        (kept if can_be_asked(cut) else left_out).append(cut)
    refuse_none(source, len(kept), len(kept) + len(left_out))
    if left_out:
        all_of_them = counted(len(kept) + len(left_out), "question")
        logger.warning(
            f"{source.json_path}: {len(left_out)} of {all_of_them} left out, first "
            f"{left_out[0].id!r}: no text, no interval within the video or no options."
        )
    return kept


def refuse_none(source: Source, num_kept: int, num_read: int) -> None:
    """Raise DataError if no sample of the source is usable."""
    if not num_read:
        raise DataError(f"{source.json_path} holds no sample.")
    if not num_kept:
        raise DataError(
            f"{source.json_path} holds no sample that can be asked: "
            f"{counted(num_read, 'question')} "
            "without text, without an interval within the video or without options."
        )


def read_whole(source: Source, header_duration_s: HeaderDuration | None = None) -> list[Sample]:
    """Return all samples of the file with uncut intervals, also unusable ones, for evaluation."""
    reader = READERS[source.format]
    with without_collector():
        if is_list(source):
            numbered = list_records(source)
            keyed: Iterable[Any] = (
                (number, checked_record(record, number, source, line))
                for number, (record, _, _, line) in enumerate(numbered)
            )
        else:
            checked = _checked_whole(source)
            keyed = checked.items() if isinstance(checked, dict) else enumerate(checked)
        return reader.read(keyed, source, header_duration_s)


def is_list(source: Source) -> bool:
    """Return whether the file is a list (.json, .jsonl, a table) that is read record by record."""
    return READERS[source.format].is_list and not source.json_path.endswith(".csv")


def list_records(source: Source) -> Iterator[LocatedRecord]:
    """Yield the records of a source for which `is_list` is true. Raises DataError."""
    if is_table(source.json_path):
        return table_records(source.json_path)
    if not is_lines(source.json_path) and not begins_a_list(source.json_path):
        if not (content := load(source.json_path)):
            refuse_none(source, 0, 0)
        error = WrongTopLevelType(source, "a list", content)
        raise _other_format(source, error) or error
    return records(source.json_path)


def load_records(source: Source) -> Any:
    """Return the JSON content of annotations that are not a list; a folder is keyed by file."""
    if READERS[source.format].by_file:
        return load_by_file(source.json_path)
    if source.format == "next_gqa" and source.json_path.endswith(".csv"):
        return load_csv(source.json_path)
    return load(source.json_path)


def read_record(
    record: Any,
    number: int,
    source: Source,
    header_duration_s: HeaderDuration | None = None,
    line: int = 0,
) -> Sample | None:
    """Return the sample of one list record with index `number`; None if the question is unusable.

    Raises DataError as `read` does, and any error of `header_duration_s`.
    """
    [sample] = samples_of(record, number, source, header_duration_s, line)
    cut = cut_to_video(sample)
    return cut if can_be_asked(cut) else None


def samples_of(
    record: Any,
    key: str | int,
    source: Source,
    header_duration_s: HeaderDuration | None = None,
    line: int = 0,
) -> list[Sample]:
    """Return all samples of one record with uncut intervals, also unusable ones.

    `key` is the record's key in an object, or its index in a list. `line` is its line in a .jsonl
    file.
    """
    reader = READERS[source.format]
    if isinstance(key, str):
        checked = validated(reader.schema, {key: record}, source)[key]
    else:
        checked = checked_record(record, key, source, line)
    return reader.read([(key, checked)], source, header_duration_s)


def check_format(source: Source) -> None:
    """Raise DataError if the first record has another format than its source names."""
    try:
        if is_list(source):
            for entry in islice(list_records(source), 1):
                checked_record(entry.record, 0, source, entry.line)
        else:
            _checked_whole(source)
    except (OtherFormat, WrongTopLevelType):
        raise
    except DataError:
        return  # an error of one record: reported when the whole file is read


def checked_record(record: Any, number: int, source: Source, line: int = 0) -> Record:
    """Return a list record validated against the source's format. Raises DataError.

    If the first record is invalid and the file matches another format, the message names that
    format.
    """
    location = f"line {line}" if line else f"record {number}"
    try:
        checked: Record
        [checked] = validated(READERS[source.format].schema, [record], source, location)
    except DataError as error:
        raise ((number == 0 and _other_format(source, error)) or error) from None
    return checked


def charades_sta(
    records: Iterable[tuple[str, CharadesSta]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per sentence."""
    for video, record in records:
        if len(record.timestamps) != len(record.sentences):
            raise DataError(
                f"{source.json_path}: record {video!r} has "
                f"{counted(len(record.timestamps), 'timestamp')} and "
                f"{counted(len(record.sentences), 'sentence')}; expected one sentence for each."
            )
        path = video_path(video_file(video), source, video)
        for index, (span, sentence) in enumerate(
            zip(record.timestamps, record.sentences, strict=True)
        ):
            sample = Sample(
                id=f"{video}/{index}",
                task="temporal_grounding",
                media=(VideoClip(path),),
                duration_s=record.duration,
                query=sentence.strip(),
                rationale=sentence.strip(),
                intervals_s=to_intervals([span]),
                options=(),
                option="",
            )
            yield apply_clip(sample, record, source)


def multiple_choice(
    records: Iterable[tuple[int, MultipleChoice]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    for _, record in records:
        yield apply_clip(_choice(record, source), record, source)


def next_gqa(
    records: Iterable[tuple[int, NextGqa]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    for _, record in records:
        sample = _choice(record, source, task="grounded_qa", intervals_s=to_intervals(record.glue))
        yield apply_clip(sample, record, source)


def temporal_r1(
    records: Iterable[tuple[int, TemporalR1]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record. Durations that records lack are read from the videos."""
    header_s: dict[str, float] = {}  # path -> duration; a video may have several questions
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
        # keep the query alone: the task adds the question text around it
        query = record.problem.strip().removeprefix(before).removesuffix(after).strip()
        sample = Sample(
            id=f"{record.video}/{index}",
            task="temporal_grounding",
            media=(VideoClip(path),),
            duration_s=duration_s,
            query=query,
            rationale=query,
            intervals_s=to_intervals([[t * duration_s for t in record.solution]]),
            options=(),
            option="",
        )
        yield apply_clip(sample, record, source)


READERS: dict[str, Reader] = {
    "charades_sta": Reader(
        schema=TypeAdapter(dict[str, CharadesSta]), samples=charades_sta, is_list=False
    ),
    "next_gqa": Reader(schema=TypeAdapter(list[NextGqa]), samples=next_gqa, is_list=True),
    "multiple_choice": Reader(
        schema=TypeAdapter(list[MultipleChoice]), samples=multiple_choice, is_list=True
    ),
    "temporal_r1": Reader(
        schema=TypeAdapter(list[TemporalR1]), samples=temporal_r1, is_list=True, unit="fraction"
    ),
    "generic": GENERIC_READER,
    **BENCHMARK_READERS,
    **MOMENT_READERS,
    **LONG_VIDEO_READERS,
    **MEDIA_READERS,
}


def _choice(
    record: MultipleChoice,
    source: Source,
    task: str = "multiple_choice",
    intervals_s: tuple[Interval, ...] = (),
) -> Sample:
    """Return the sample of a multiple-choice record."""
    return choice_sample(
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


def _checked_whole(source: Source) -> Any:
    """Return the content of annotations that are not a list, validated. Raises DataError."""
    content = load_records(source)
    if not content:
        refuse_none(source, 0, 0)
    try:
        return validated(READERS[source.format].schema, content, source)
    except DataError as error:
        raise _other_format(source, error) or error from None


def _other_format(source: Source, error: DataError) -> OtherFormat | None:
    """Return `found` as an error that names the format the file matches; None without a match."""
    others = matching_formats(source, READERS)
    if not others:
        return None
    own = str(error).removeprefix(source.json_path).strip(" ,:.")
    reason = error.wanted if isinstance(error, WrongTopLevelType) else own
    return OtherFormat(source, reason, others)
