"""Readers of benchmark formats, as their authors released them.

Training formats are in training.py.

  tvgbench             [{path, question, answer "13.4-28.1", duration}] (Time-R1); the video is the
                       last component of its path
  activitynet_rtl      [{question_id, vid, question, answer "<3.2> <9.0> because ...", duration}]
                       (LITA, annot_val_1_q229.json); the video of vid X is v_X.mp4
  mvbench              {video, question, candidates, answer}, one file per sub-task, named after the
                       sub-task, in one folder; videos are in the folders of FOLDERS, as in the
                       pre-cut release that Temporal-R1 evaluates
  tempcompass          {video: {dimension: [{question, answer}]}} in multi-choice.json, yes_no.json
                       and caption_matching.json; the last lines of a question are its options
  video_mme            [{question_id, videoID, duration "short", domain, task_type, question,
                       options ["A. ...", ...], answer "C"}], the rows of its table
  mmvu                 [{id, video (a URL), question_type, metadata {subject}, question, choices
                       {"A": ...}, answer}]; open-ended questions have no options

Questions of benchmarks without ids get VIDEO/INDEX, where INDEX counts the questions of one video.

Not supported: TempCompass captions and MMVU's open-ended answers, which need a language model as
judge. Lists may also be parquet tables (tables.py).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from string import ascii_uppercase
from typing import Any

from pydantic import TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import (
    HeaderDuration,
    Name,
    Options,
    Reader,
    Record,
    Seconds,
    apply_clip,
    choice_sample,
    option_texts,
    to_intervals,
    video_file,
    video_path,
)
from megatron_vrl.errors import DataError
from megatron_vrl.types import Sample, VideoClip

_RANGE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*-\s*([0-9]+(?:\.[0-9]+)?)\s*")
_STAMP = re.compile(r"<([0-9]*\.?[0-9]+|[0-9]+\.)>")

FOLDERS = {  # MVBench sub-task -> video folder
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}


class TvgBench(Record):
    """Grounding question of TVGBench."""

    path: str
    question: str
    answer: str
    duration: Seconds
    dataset_name: str = ""
    qsemtype: str = ""


class ActivityNetRtl(Record):
    """Grounding question of ActivityNet-RTL."""

    question_id: Name | int
    vid: str
    question: str
    answer: str
    duration: Seconds


class MvBench(Record):
    """Multiple-choice question of MVBench."""

    video: str
    question: str
    candidates: Options
    answer: str


class TempCompass(Record):
    """Question of TempCompass. Options are lines of `question`."""

    question: str
    answer: str


class VideoMme(Record):
    """Multiple-choice question of Video-MME."""

    question_id: Name
    videoID: str
    duration: str
    domain: str
    task_type: str
    question: str
    options: Options
    answer: str


class MmvuMetadata(Record):
    """Subject of an MMVU question."""

    subject: str


class Mmvu(Record):
    """Question of MMVU, multiple choice or open-ended."""

    id: Name
    video: str
    question_type: str
    metadata: MmvuMetadata
    question: str
    choices: dict[str, str]
    answer: str


def tvgbench(
    records: Iterable[tuple[int, TvgBench]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record."""
    for index, record in records:
        match = _RANGE.fullmatch(record.answer)
        if match is None:
            raise _refused(source, index, record.answer, 'times such as "13.4-28.1"')
        name = record.path.rpartition("/")[2]
        labels = {"dataset": record.dataset_name, "kind": record.qsemtype}
        sample = _grounding(
            f"{name}/{index}",
            video_path(name, source, index),
            record.duration,
            record.question,
            (float(match[1]), float(match[2])),
            labels=tuple(f"{kind}/{label}" for kind, label in labels.items() if label),
        )
        yield apply_clip(sample, record, source)


def activitynet_rtl(
    records: Iterable[tuple[int, ActivityNetRtl]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record. The interval is made of the first two times in the answer."""
    for index, record in records:
        stamps = [float(stamp) for stamp in _STAMP.findall(record.answer)[:2]]
        if len(stamps) < 2:
            raise _refused(source, index, record.answer, 'two times such as "<3.2>"')
        sample = _grounding(
            str(record.question_id),
            video_path(video_file(f"v_{record.vid}"), source, index),
            record.duration,
            record.question,
            (min(stamps), max(stamps)),
        )
        yield apply_clip(sample, record, source)


def mvbench(
    records: Iterable[tuple[str, list[MvBench]]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record of every sub-task."""
    seen: Counter[str] = Counter()
    for sub_task, of_task in records:
        folder = f"{FOLDERS[sub_task]}/" if sub_task in FOLDERS else ""
        for record in of_task:
            sample = choice_sample(
                source,
                _numbered(record.video, seen),
                video=folder + record.video,
                question=record.question,
                options=record.candidates,
                answer=_letter_of(record),
                labels=(f"sub_task/{sub_task}",),
            )
            yield apply_clip(sample, record, source)


def tempcompass(
    records: Iterable[tuple[str, dict[str, dict[str, list[TempCompass]]]]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per question."""
    seen: Counter[str] = Counter()
    for file, videos in records:
        if file == "captioning":
            raise DataError(
                f"{source.json_path}: captioning.json asks for free captions, which a language "
                "model has to judge: give a folder with only multi-choice.json, yes_no.json and "
                "caption_matching.json."
            )
        for video, dimensions in videos.items():
            for dimension, questions in dimensions.items():
                for record in questions:
                    question, options = _in_lines(record)
                    yield choice_sample(
                        source,
                        _numbered(video, seen),
                        video=video_file(video),
                        question=question,
                        options=options,
                        answer=record.answer,
                        labels=(f"dimension/{dimension}", f"form/{file}"),
                    )


def video_mme(
    records: Iterable[tuple[int, VideoMme]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record."""
    for _, record in records:
        labels = (record.duration, record.domain, record.task_type)
        kinds = ("duration", "domain", "task_type")
        yield choice_sample(
            source,
            record.question_id,
            video=video_file(record.videoID),
            question=record.question,
            options=record.options,
            answer=record.answer,
            labels=tuple(f"{kind}/{label}" for kind, label in zip(kinds, labels, strict=True)),
        )


def mmvu(
    records: Iterable[tuple[int, Mmvu]], source: Source, header_duration_s: HeaderDuration | None
) -> Iterator[Sample]:
    """Yield one sample per record. An open-ended question has no options."""
    for _, record in records:
        video = record.video.rpartition("/videos/")[2]
        labels = (f"subject/{record.metadata.subject}",)
        if record.question_type == "multiple-choice":
            yield choice_sample(
                source,
                record.id,
                video=video,
                question=record.question,
                options=[text for _, text in sorted(record.choices.items())],
                answer=record.answer,
                labels=labels,
            )
        else:
            yield Sample(
                id=record.id,
                task="multiple_choice",
                media=(VideoClip(video_path(video, source, record.id)),),
                duration_s=0.0,
                query=record.question.strip(),
                rationale="",
                intervals_s=(),
                options=(),
                option="",
                labels=labels,
            )


BENCHMARK_READERS: dict[str, Reader] = {
    "tvgbench": Reader(schema=TypeAdapter(list[TvgBench]), samples=tvgbench, is_list=True),
    "activitynet_rtl": Reader(
        schema=TypeAdapter(list[ActivityNetRtl]), samples=activitynet_rtl, is_list=True
    ),
    "mvbench": Reader(
        schema=TypeAdapter(dict[str, list[MvBench]]), samples=mvbench, is_list=False, by_file=True
    ),
    "tempcompass": Reader(
        schema=TypeAdapter(dict[str, dict[str, dict[str, list[TempCompass]]]]),
        samples=tempcompass,
        is_list=False,
        by_file=True,
    ),
    "video_mme": Reader(schema=TypeAdapter(list[VideoMme]), samples=video_mme, is_list=True),
    "mmvu": Reader(schema=TypeAdapter(list[Mmvu]), samples=mmvu, is_list=True),
}


def _grounding(
    name: str,
    video: str,
    duration_s: float,
    query: str,
    span: Sequence[float],
    labels: tuple[str, ...] = (),
) -> Sample:
    """Return a temporal grounding sample."""
    return Sample(
        id=name,
        task="temporal_grounding",
        media=(VideoClip(video),),
        duration_s=duration_s,
        query=query.strip(),
        rationale=query.strip(),
        intervals_s=to_intervals([span]),
        options=(),
        option="",
        labels=labels,
    )


def _numbered(video: str, seen: Counter[str]) -> str:
    """Return the id VIDEO/INDEX of the next question of a video."""
    index = seen[video]
    seen[video] += 1
    return f"{video}/{index}"


def _letter_of(record: MvBench) -> str:
    """Return the letter of the candidate that equals the answer, else the answer itself.

    The candidates are compared first because a candidate may itself be a letter.
    """
    if record.candidates.count(record.answer) == 1:
        return ascii_uppercase[record.candidates.index(record.answer)]
    return record.answer


def _in_lines(record: TempCompass) -> tuple[str, list[str]]:
    """Return (question, options with letters) of a question whose last lines are its options.

    A question without such lines has the options yes and no.
    """
    lines = record.question.strip().splitlines()
    for first in range(1, len(lines) - 1):
        options = [line.strip() for line in lines[first:]]
        if option_texts(options) != tuple(options):
            return "\n".join(lines[:first]), options
    return record.question, ["yes", "no"]


def _refused(source: Source, record: Any, answer: str, expected: str) -> DataError:
    """Return the error for an answer that does not have the expected format."""
    return DataError(
        f"{source.json_path}: record {record!r}: field 'answer' is {answer!r:.80}, expected "
        f"{expected}."
    )
