"""Annotation files in their published forms -> VideoSample. A new form is one row in `READERS`.

charades_sta    {video id: {duration, timestamps [[s, e], ...], sentences}}: Charades-STA and
                ActivityNet Captions; a video id without an ending is an .mp4
next_gqa        [{id, video, question, options, duration, glue [[s, e], ...], answer "(C)"}], or
                the authors' CSV, see megatron_vrl/data/formats/nextgqa_csv.py
multiple_choice the same without `glue`
temporal_r1     [{dataset, video, problem, solution [s, e] in [0, 1], video_length}], as released
                with Temporal-R1, where the tag "charades_train" comes without `video_length`
generic         [{id, task, video, duration, question, truth {...}}]: questions of a task with a
                truth of its own, see megatron_vrl/data/formats/generic.py

The forms of further benchmarks are in benchmarks.py, the reading of .json and .jsonl in
json_files.py. Any record may also have `clip` [s, e], the part of its video that is shown; its
other times are the video's, and those of its samples count from s. Fields not named here are passed
over. No video is touched, except where the record keeps no duration. `read` cuts intervals at the
video's ends (in Charades-STA many run past them). A question that is then left without an interval,
or that has no text or no options, is left out and warned of, since the published files hold a few.
Anything else that is wrong is refused, and so is a file of another form or without samples.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from pydantic import TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.data.formats.benchmarks import BENCHMARK_READERS
from megatron_vrl.data.formats.generic import GENERIC_READER
from megatron_vrl.data.formats.json_files import (
    Found,
    begins_a_list,
    is_lines,
    load,
    load_by_file,
    records,
    without_collector,
)
from megatron_vrl.data.formats.nextgqa_csv import load_csv
from megatron_vrl.data.formats.records import (
    HeaderDuration,
    Name,
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
from megatron_vrl.data.formats.validation import Misshapen, OtherForm, looks_like, validated
from megatron_vrl.errors import DataError, counted
from megatron_vrl.tasks import can_be_asked
from megatron_vrl.tasks.temporal_grounding import QUESTION
from megatron_vrl.types import Interval, VideoSample

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
    """Return the samples of one source that can be asked, in the file's order, intervals cut.

    `header_duration_s` reads a video's own duration, for records that keep none.
    Raises DataError naming file, record, field, the value seen and what is expected, and if no
    sample can be asked.
    """
    kept: list[VideoSample] = []
    left_out: list[VideoSample] = []
    for sample in read_whole(source, header_duration_s):
        cut = within(sample)
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
    """Raise DataError if no sample of the source can be asked."""
    if not num_read:
        raise DataError(f"{source.json_path} holds no sample.")
    if not num_kept:
        raise DataError(
            f"{source.json_path} holds no sample that can be asked: "
            f"{counted(num_read, 'question')} "
            "without text, without an interval within the video or without options."
        )


def read_whole(
    source: Source, header_duration_s: HeaderDuration | None = None
) -> list[VideoSample]:
    """Every question of the file, with its intervals as published: for an evaluation."""
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
        return list(reader.samples(keyed, source, header_duration_s))


def is_list(source: Source) -> bool:
    """Return whether the source's records are read one by one from a JSON list."""
    return READERS[source.format].is_list and not source.json_path.endswith(".csv")


def list_records(source: Source) -> Iterator[Found]:
    """Yield the records of a source for which `is_list` holds, as JSON. Raises DataError."""
    if not is_lines(source.json_path) and not begins_a_list(source.json_path):
        if not (content := load(source.json_path)):
            refuse_none(source, 0, 0)
        misshapen = Misshapen(source, "a list", content)
        raise _other_form(source, misshapen) or misshapen
    return records(source.json_path)


def load_records(source: Source) -> Any:
    """Return the JSON of annotations that are no JSON list: of several files, by their names."""
    if READERS[source.format].by_file:
        return load_by_file(source.json_path)
    if source.format == "next_gqa" and source.json_path.endswith(".csv"):
        return load_csv(source.json_path)
    return load(source.json_path)


def within(sample: VideoSample) -> VideoSample:
    """Its intervals cut to the video; what is then empty is gone."""
    cut = _within(sample.intervals_s, sample.duration_s)
    return sample if cut == sample.intervals_s else replace(sample, intervals_s=cut)


def read_record(
    record: Any,
    number: int,
    source: Source,
    header_duration_s: HeaderDuration | None = None,
    line: int = 0,
) -> VideoSample | None:
    """The sample of one record of a list, its `number` counted from 0; None if it cannot be asked.

    Raises DataError as `read` does, and whatever `header_duration_s` raises.
    """
    [sample] = samples_of(record, number, source, header_duration_s, line)
    cut = within(sample)
    return cut if can_be_asked(cut) else None


def samples_of(
    record: Any,
    key: str | int,
    source: Source,
    header_duration_s: HeaderDuration | None = None,
    line: int = 0,
) -> list[VideoSample]:
    """All of one record, also those that cannot be asked, with their intervals as published.

    `key` is the record's key, or its number in a list, which lies in `line` of a .jsonl file.
    """
    reader = READERS[source.format]
    if isinstance(key, str):
        checked = validated(reader.form, {key: record}, source)[key]
    else:
        checked = checked_record(record, key, source, line)
    return list(reader.samples([(key, checked)], source, header_duration_s))


def refuse_other_form(source: Source) -> None:
    """Raise DataError if a file is of another form than its source's, by its first record."""
    try:
        if is_list(source):
            for found in islice(list_records(source), 1):
                checked_record(found.record, 0, source, found.line)
        else:
            _checked_whole(source)
    except (OtherForm, Misshapen):
        raise
    except DataError:
        return  # of one record, or of a file that no one can read: told when it is read whole


def checked_record(record: Any, number: int, source: Source, line: int = 0) -> Record:
    """Return a list's record in the source's form. Raises DataError.

    If it is the file's first and the file looks like another form, the sentence says so.
    """
    place = f"line {line}" if line else f"record {number}"
    try:
        checked: Record
        [checked] = validated(READERS[source.format].form, [record], source, place)
    except DataError as error:
        raise ((number == 0 and _other_form(source, error)) or error) from None
    return checked


def charades_sta(
    records: Iterable[tuple[str, CharadesSta]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
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
    "temporal_r1": Reader(
        form=TypeAdapter(list[TemporalR1]), samples=temporal_r1, is_list=True, unit="shares"
    ),
    "generic": GENERIC_READER,
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


def _checked_whole(source: Source) -> Any:
    """Annotations that are no JSON list, in their form. Raises DataError."""
    content = load_records(source)
    if not content:
        refuse_none(source, 0, 0)
    try:
        return validated(READERS[source.format].form, content, source)
    except DataError as error:
        raise _other_form(source, error) or error from None


def _other_form(source: Source, found: DataError) -> OtherForm | None:
    """Return the error for a file that looks like another form, if it does; `found` is what its
    own form refuses."""
    others = looks_like(source, READERS)
    if not others:
        return None
    own = str(found).removeprefix(source.json_path).strip(" ,:.")
    reason = found.wanted if isinstance(found, Misshapen) else own
    return OtherForm(source, reason, others)


def _within(intervals_s: Iterable[Interval], duration_s: float) -> tuple[Interval, ...]:
    cut = [(max(start_s, 0.0), min(end_s, duration_s)) for start_s, end_s in intervals_s]
    return tuple((start_s, end_s) for start_s, end_s in cut if start_s < end_s)
