"""Building blocks of annotation readers: validated records, video paths, options with letters."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.errors import DataError, counted
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.answer import read_option
from megatron_vrl.types import MEDIA_PLACE, Interval, Sample, VideoClip

VIDEO_SUFFIXES = (  # compared in lower case
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".flv"),
    *(".f4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".m2v", ".vob", ".wmv", ".asf", ".ogv"),
    *(".ogg", ".ogm", ".mxf", ".rm", ".rmvb", ".dv", ".nut", ".gif"),
)
MAX_OPTIONS = 26  # letters A to Z
LETTER_STYLES = [  # (letter, text) in "(A) red", "A. red", "A) red", "A: red", "Option 1: red"
    re.compile(rf"{style}(\S.*)", re.DOTALL | re.IGNORECASE)
    for style in (
        r"\(([A-Z])\)\s*",
        r"([A-Z])\.\s+",
        r"([A-Z])\)\s+",
        r"([A-Z]):\s+",
        r"(?:Option|Sentence|Caption) ([A-Z0-9]):\s*",
    )
]

HeaderDuration = Callable[[str], float]  # path of a video -> duration in its header, seconds

Name = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Time = Annotated[float, Field(allow_inf_nan=False)]
Span = Annotated[list[Time], Field(min_length=2, max_length=2)]
Options = Annotated[list[str], Field(min_length=2, max_length=MAX_OPTIONS)]


class Record(BaseModel):
    """Base of annotation records.

    `clip` is [start, end] in seconds of the shown part of the video.
    """

    model_config = ConfigDict(strict=True)

    clip: Span | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Schema of an annotation file and the function that makes samples of its records."""

    schema: TypeAdapter[Any]  # schema of the whole file
    samples: Callable[
        [Any, Source, HeaderDuration | None], Iterator[Sample]
    ]  # takes (key, record)s
    is_list: bool  # the file is a list with one record per sample
    unit: Literal["seconds", "fraction"] = "seconds"  # unit of times; fraction of the video, 0 to 1
    has_places: bool = False  # MEDIA_PLACE in a text is the place of a video or an image
    by_file: bool = False  # the content is {file name: content of the file}, for a folder of files

    def read(
        self, records: Any, source: Source, header_duration_s: HeaderDuration | None
    ) -> list[Sample]:
        """Return the samples of (key, record)s, with the task that `multi_segment` asks for.

        Without `has_places`, MEDIA_PLACE is removed from the texts. Raises DataError if a sample
        has media that its task or its text does not take.
        """
        tasks = {"temporal_grounding": "multi_segment_grounding"} if source.multi_segment else {}
        samples: list[Sample] = []
        for sample in self.samples(records, source, header_duration_s):
            if sample.task in tasks:
                sample = replace(sample, task=tasks[sample.task])
            sample = _without_places(sample, self.has_places)
            check_media(sample, source)
            samples.append(sample)
        return samples


def check_media(sample: Sample, source: Source) -> None:
    """Raise DataError if the sample has media that its task or its text does not take."""
    where = f"{source.json_path}: record {sample.id!r}"
    if TASKS[sample.task].needs_one_video and sample.clip is None:
        raise DataError(
            f"{where} has {counted(len(sample.clips), 'video')}, expected exactly one for the task "
            f"{sample.task}."
        )
    places = sum(text.count(MEDIA_PLACE) for text in (sample.query, *sample.options))
    if places and places != len(sample.media):
        raise DataError(
            f"{where} has {counted(places, 'place')} (U+FFFC) for videos and images, and "
            f"{len(sample.media)} of them; expected equal numbers."
        )


def _without_places(sample: Sample, has_places: bool) -> Sample:
    """Return the sample without MEDIA_PLACE in its texts; with `has_places`, in its rationale."""
    texts = (sample.rationale, sample.query, *sample.options)
    if not any(MEDIA_PLACE in text for text in texts):
        return sample
    rationale, query, *options = (text.replace(MEDIA_PLACE, "").strip() for text in texts)
    if has_places:  # an option that is an image is the rationale of its letter
        return replace(sample, rationale=rationale)
    return replace(sample, query=query, rationale=rationale, options=tuple(options))


def to_intervals(pairs: Iterable[Sequence[float]]) -> tuple[Interval, ...]:
    """Return the pairs as intervals, not cut to the video."""
    return tuple((start_s, end_s) for start_s, end_s in pairs)


def choice_sample(
    source: Source,
    record: str,
    *,
    task: str = "multiple_choice",
    video: str,
    duration_s: float = 0.0,
    question: str,
    options: Sequence[str],
    answer: str,
    intervals_s: tuple[Interval, ...] = (),
    labels: tuple[str, ...] = (),
) -> Sample:
    """Return the sample of a question with options. Option texts may contain their letters."""
    texts = option_texts(options)
    option, failure = read_option(answer, texts)
    if failure:  # an answer such as "(A)red" equals an option only with its letter
        option, failure = read_option(answer, tuple(options))
    if failure:
        raise DataError(
            f"{source.json_path}: record {record!r}: field 'answer' is {answer!r}, "
            f"expected the letter of one of {len(texts)} options."
        )
    return Sample(
        id=record,
        task=task,
        media=(VideoClip(video_path(video, source, record)),),
        duration_s=duration_s,
        query=question.strip(),
        rationale=texts[ord(option) - ord("A")],
        intervals_s=intervals_s,
        options=texts,
        option=option,
        labels=labels,
    )


def apply_clip(sample: Sample, record: Record, source: Source) -> Sample:
    """Return the sample restricted to the record's `clip`; times count from the clip's start."""
    if record.clip is None:
        return sample
    start_s, end_s = record.clip
    if not 0 <= start_s < end_s:
        raise DataError(
            f"{source.json_path}: record {sample.id!r}: field 'clip' is {record.clip}, expected "
            "[start, end] in seconds with 0 <= start < end."
        )
    if sample.clip is None:
        raise DataError(
            f"{source.json_path}: record {sample.id!r}: field 'clip' needs exactly one video: "
            "remove the field."
        )
    shown = sample.clip._replace(window_s=(start_s, end_s))
    return replace(
        sample,
        media=tuple(shown if medium == sample.clip else medium for medium in sample.media),
        duration_s=min(end_s, sample.duration_s) - start_s if sample.duration_s else 0.0,
        intervals_s=to_intervals([(s - start_s, e - start_s) for s, e in sample.intervals_s]),
    )


def cut_to_video(sample: Sample) -> Sample:
    """Return the sample with its intervals cut to the video. Empty intervals are removed."""
    pairs = [(max(s, 0.0), min(e, sample.duration_s)) for s, e in sample.intervals_s]
    cut = tuple((s, e) for s, e in pairs if s < e)
    return sample if cut == sample.intervals_s else replace(sample, intervals_s=cut)


def option_texts(options: Sequence[str]) -> tuple[str, ...]:
    """Return the stripped option texts, without their letters if the options contain letters.

    Options contain letters if each one begins with its own letter, A, B, C in order, in one common
    style of LETTER_STYLES. So "E. coli" among other names keeps its "E.".
    """
    texts = tuple(option.strip() for option in options)
    for style in LETTER_STYLES:
        matches = [style.fullmatch(text) for text in texts]
        plain = [match[2] for match in matches if match]
        letters = "".join(match[1] for match in matches if match)
        in_order = (ascii_uppercase[: len(texts)], "123456789"[: len(texts)])
        if len(plain) == len(texts) and letters.upper() in in_order:
            return tuple(plain)
    return texts


def video_file(video: str) -> str:
    """Return the file name of a video: `video`, with ".mp4" added if it has no video ending."""
    return video if video.lower().endswith(VIDEO_SUFFIXES) else f"{video}.mp4"


def video_path(name: str, source: Source, record: str | int) -> str:
    """Return the path in the data folder. Only the name is checked, not the disk.

    Raises DataError if the name leads out of the folder. Annotations may have half a million
    records, too many for a file system call each.
    """
    if "\0" in name:
        raise DataError(
            f"{source.json_path}: record {record!r}: video {name!r} holds a NUL character, which "
            "no file name may."
        )
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside in (".", "..") or inside.startswith(f"..{os.sep}"):
        raise DataError(
            f"{source.json_path}: record {record!r}: video {name!r} is not inside the data folder "
            f"{source.data_folder!r}; expected a path relative to it."
        )
    return os.path.join(source.data_folder, inside)
