"""Published forms of benchmarks, beside those of `readers.py`.

tvgbench             [{path, question, answer "13.4-28.1", duration}] (Time-R1); the video is the
                     last part of its path
activitynet_rtl      [{question_id, vid, question, answer "<3.2> <9.0> because ...", duration}]
                     (LITA, annot_val_1_q229.json); the video of vid X is v_X.mp4
mvbench              {video, question, candidates, answer} in one file per sub-task, whose name is
                     the sub-task; a folder of such files is the whole. Videos lie in the folders of
                     the pre-cut release that Temporal-R1 evaluates, named by FOLDERS
tempcompass          {video: {dimension: [{question, answer}]}} in multi-choice.json, yes_no.json
                     and caption_matching.json; options stand in the lines of the question
video_mme            [{question_id, videoID, duration "short", domain, task_type, question, options
                     ["A. ...", ...], answer "C"}], the rows of its table
mmvu                 [{id, video (an address), question_type, metadata {subject}, question, choices
                     {"A": ...}, answer}]; open-ended questions have no options

Sets without numbers of their own get VIDEO/INDEX, the index counting the questions of one video.
Left out: TempCompass' captions and MMVU's open-ended answers, which a language model has to judge;
tables that are not JSON (`pandas.read_parquet(FILE).to_json(OUT, orient="records")` makes them so).
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
    choice,
    clipped,
    option_texts,
    spans,
    video_file,
    video_path,
)
from megatron_vrl.errors import DataError
from megatron_vrl.types import VideoSample

_RANGE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*-\s*([0-9]+(?:\.[0-9]+)?)\s*")
_STAMP = re.compile(r"<([0-9]*\.?[0-9]+|[0-9]+\.)>")

FOLDERS = {  # of MVBench's sub-tasks
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
    path: str
    question: str
    answer: str
    duration: Seconds
    dataset_name: str = ""
    qsemtype: str = ""


class ActivityNetRtl(Record):
    question_id: Name | int
    vid: str
    question: str
    answer: str
    duration: Seconds


class MvBench(Record):
    video: str
    question: str
    candidates: Options
    answer: str


class TempCompass(Record):
    question: str
    answer: str


class VideoMme(Record):
    question_id: Name
    videoID: str
    duration: str
    domain: str
    task_type: str
    question: str
    options: Options
    answer: str


class MmvuMetadata(Record):
    subject: str


class Mmvu(Record):
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
) -> Iterator[VideoSample]:
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
        yield clipped(sample, record, source)


def activitynet_rtl(
    records: Iterable[tuple[int, ActivityNetRtl]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
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
        yield clipped(sample, record, source)


def mvbench(
    records: Iterable[tuple[str, list[MvBench]]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    seen: Counter[str] = Counter()
    for sub_task, of_task in records:
        folder = f"{FOLDERS[sub_task]}/" if sub_task in FOLDERS else ""
        for record in of_task:
            sample = choice(
                source,
                _numbered(record.video, seen),
                video=folder + record.video,
                question=record.question,
                options=record.candidates,
                answer=_letter_of(record),
                labels=(f"sub_task/{sub_task}",),
            )
            yield clipped(sample, record, source)


def tempcompass(
    records: Iterable[tuple[str, dict[str, dict[str, list[TempCompass]]]]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    seen: Counter[str] = Counter()
    for form, videos in records:
        if form == "captioning":
            raise DataError(
                f"{source.json_path}: captioning.json asks for free captions, which a language "
                "model has to judge: give a folder with multi-choice.json, yes_no.json and "
                "caption_matching.json alone."
            )
        for video, dimensions in videos.items():
            for dimension, questions in dimensions.items():
                for record in questions:
                    question, options = _in_lines(record)
                    yield choice(
                        source,
                        _numbered(video, seen),
                        video=video_file(video),
                        question=question,
                        options=options,
                        answer=record.answer,
                        labels=(f"dimension/{dimension}", f"form/{form}"),
                    )


def video_mme(
    records: Iterable[tuple[int, VideoMme]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    for _, record in records:
        labels = (record.duration, record.domain, record.task_type)
        kinds = ("duration", "domain", "task_type")
        yield choice(
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
) -> Iterator[VideoSample]:
    for _, record in records:
        video = record.video.rpartition("/videos/")[2]
        labels = (f"subject/{record.metadata.subject}",)
        if record.question_type == "multiple-choice":
            yield choice(
                source,
                record.id,
                video=video,
                question=record.question,
                options=[text for _, text in sorted(record.choices.items())],
                answer=record.answer,
                labels=labels,
            )
        else:
            yield VideoSample(
                id=record.id,
                task="multiple_choice",
                video=video_path(video, source, record.id),
                duration_s=0.0,
                query=record.question.strip(),
                rationale="",
                intervals_s=(),
                options=(),
                option="",
                labels=labels,
            )


BENCHMARK_READERS: dict[str, Reader] = {
    "tvgbench": Reader(form=TypeAdapter(list[TvgBench]), samples=tvgbench, is_list=True),
    "activitynet_rtl": Reader(
        form=TypeAdapter(list[ActivityNetRtl]), samples=activitynet_rtl, is_list=True
    ),
    "mvbench": Reader(
        form=TypeAdapter(dict[str, list[MvBench]]), samples=mvbench, is_list=False, by_file=True
    ),
    "tempcompass": Reader(
        form=TypeAdapter(dict[str, dict[str, dict[str, list[TempCompass]]]]),
        samples=tempcompass,
        is_list=False,
        by_file=True,
    ),
    "video_mme": Reader(form=TypeAdapter(list[VideoMme]), samples=video_mme, is_list=True),
    "mmvu": Reader(form=TypeAdapter(list[Mmvu]), samples=mmvu, is_list=True),
}


def _grounding(
    name: str,
    video: str,
    duration_s: float,
    query: str,
    span: Sequence[float],
    labels: tuple[str, ...] = (),
) -> VideoSample:
    return VideoSample(
        id=name,
        task="temporal_grounding",
        video=video,
        duration_s=duration_s,
        query=query.strip(),
        rationale=query.strip(),
        intervals_s=spans([span]),
        options=(),
        option="",
        labels=labels,
    )


def _numbered(video: str, seen: Counter[str]) -> str:
    index = seen[video]
    seen[video] += 1
    return f"{video}/{index}"


def _letter_of(record: MvBench) -> str:
    """Letter of the candidate that the answer repeats: a candidate may itself be a letter."""
    if record.candidates.count(record.answer) == 1:
        return ascii_uppercase[record.candidates.index(record.answer)]
    return record.answer


def _in_lines(record: TempCompass) -> tuple[str, list[str]]:
    """(question, options with their letters) of a question whose last lines are its options."""
    lines = record.question.strip().splitlines()
    for first in range(1, len(lines) - 1):
        options = [line.strip() for line in lines[first:]]
        if option_texts(options) != tuple(options):
            return "\n".join(lines[:first]), options
    return record.question, ["yes", "no"]


def _refused(source: Source, record: Any, answer: str, expected: str) -> DataError:
    return DataError(
        f"{source.json_path}: record {record!r}: field 'answer' is {answer!r:.80}, expected "
        f"{expected}."
    )
