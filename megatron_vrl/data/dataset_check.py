"""DatasetCheck: checks annotations, files, durations, intervals and duplicates before a run.

Problems have the format of quarantine.jsonl. Each file is probed once, in the decoding processes
that a run uses, so a file that hangs there is found here.

Not checked: whether answers are correct, and damage inside compressed pictures unless `decode` is
on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from megatron_vrl.checkpoint.layout import architecture_of, hf_dir_of
from megatron_vrl.config import ROW_KEYS, RunConfig, Source
from megatron_vrl.data.formats.records import cut_to_video
from megatron_vrl.data.formats.training import (
    READERS,
    check_format,
    is_list,
    list_records,
    load_records,
    samples_of,
)
from megatron_vrl.data.media_limits import limits_of
from megatron_vrl.data.problems import Problem
from megatron_vrl.data.units import FileTimes, interval_problems
from megatron_vrl.errors import CheckpointError, DataError, VideoError
from megatron_vrl.models.families import FAMILIES, family_named, family_of
from megatron_vrl.models.family import Family
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import ImageFile, Media, Sample, VideoClip
from megatron_vrl.video import VideoReader
from megatron_vrl.video.image import ImageRules, image_rules
from megatron_vrl.video.time_axis import time_problems

AT_A_TIME = 256  # records whose files are probed together
SLACK_S, SLACK_FRACTION = 1.0, 0.05  # tolerance between annotated and real duration: the larger one


@dataclass(slots=True)
class DatasetStats:
    """Number of samples, and vision tokens per readable video and image."""

    samples: int = 0
    text_only: int = 0  # samples without a video or an image
    tokens: dict[Media, int] = field(default_factory=dict)  # video or image -> vision tokens


def distinct_sources(cfg: RunConfig) -> list[Source]:
    """Return the sources of all phases and splits, each file once."""
    evaluated = [source for sources in cfg.data.evaluation.values() for source in sources]
    sources = [*cfg.data.sft, *cfg.data.train, *evaluated]
    columns = {"json_path", "data_folder", "format", *ROW_KEYS}
    return list({source.model_dump_json(include=columns): source for source in sources}.values())


def num_records(source: Source) -> int:
    """Return the number of records of a source.

    Raises DataError if the file cannot be read, has another format or is empty.
    """
    check_format(source)
    count = sum(1 for _ in _records(source))
    if not count:
        raise DataError(f"{source.json_path} holds no sample.")
    return count


class DatasetCheck:
    """Checks sources one after the other. Duplicates are found across sources.

    Call `problems` for a source, exhaust it, then call `file_problems`.
    """

    def __init__(self, cfg: RunConfig, decode: bool):
        """`decode`: also decode every video. `family` counts the tokens of a video."""
        video = cfg.video if decode else cfg.video.model_copy(update={"decoder": "pyav"})
        self.stats = DatasetStats()
        self._cfg, self._decode = cfg, decode
        self.family = _family(cfg)
        self._reader = VideoReader(video, self.family.pixels, _image_rules(cfg, self.family))
        self._limits = limits_of(cfg.data)
        self._probed: set[Media] = set()
        self._durations_s: dict[VideoClip, float] = {}
        self._time_faults: dict[Media, list[str]] = {}  # not reported yet
        self._questions: set[int] = set()
        self._ids: set[str] = set()  # ids in the current source

    def problems(self, source: Source) -> Iterator[list[Problem]]:
        """Yield the problems of each record, in order.

        Raises DataError if the file cannot be read.
        """
        records = _records(source)
        self._times = FileTimes(source, READERS[source.format].unit)
        self._ids.clear()
        self._samples_before = self.stats.samples
        self._has_own_ids = not READERS[source.format].by_file
        while some := list(islice(records, AT_A_TIME)):
            read = [self._read(*one, source) for one in some]
            files = self._files([sample for samples, _ in read for sample in samples])
            for samples, record_problems in read:
                yield [*record_problems, *self._sample_problems(samples, files)]

    def file_problems(self) -> list[Problem]:
        """Return the problems of the whole file. Call it after `problems` is exhausted."""
        sentences = {"unit": self._times.problem()}
        if self.stats.samples == self._samples_before:
            sentences["annotation"] = f"{self._times.source.json_path} holds no sample."
        return [
            Problem(sample="", video="", kind=kind, reason=sentence)
            for kind, sentence in sentences.items()
            if sentence
        ]

    def _read(
        self, key: str | int, record: Any, line: int, source: Source
    ) -> tuple[list[Sample], list[Problem]]:
        """Return the samples of a record, or no samples and the problem that prevents them."""
        try:
            read = samples_of(record, key, source, self._reader.duration_s, line)
        except DataError as error:
            return [], [Problem(sample="", video="", kind="annotation", reason=str(error))]
        except VideoError as error:
            reason = f"{source.json_path}: record {key}: its video {error}"
            return [], [Problem(sample="", video="", kind=error.kind, reason=reason)]
        self.stats.samples += len(read)
        self.stats.text_only += sum(not sample.media for sample in read)
        return [sample.inside(source.data_folder) for sample in read], []

    def _files(self, samples: Sequence[Sample]) -> dict[Media, VideoError]:
        """Return the errors of files that were not probed before."""
        media = dict.fromkeys(medium for sample in samples for medium in sample.media)
        new = [medium for medium in media if medium not in self._probed]
        self._probed |= set(new)
        bad = self._images([medium for medium in new if isinstance(medium, ImageFile)])
        bad |= self._clips([medium for medium in new if isinstance(medium, VideoClip)])
        if self._decode:
            good = [medium for medium in new if medium not in bad]
            decoded = zip(good, self._reader.read(good), strict=True)
            bad |= {medium: read for medium, read in decoded if isinstance(read, VideoError)}
        return bad

    def _images(self, new: Sequence[ImageFile]) -> dict[Media, VideoError]:
        """Count the tokens of images and return the errors."""
        bad: dict[Media, VideoError] = {}
        for image, tokens in zip(new, self._reader.count_tokens(new), strict=True):
            if isinstance(tokens, VideoError):
                bad[image] = tokens
            else:
                self.stats.tokens[image] = tokens
        return bad

    def _clips(self, new: Sequence[VideoClip]) -> dict[Media, VideoError]:
        """Note tokens, durations and faults of the times of videos, and return the errors."""
        bad: dict[Media, VideoError] = {}
        for clip, plan in zip(new, self._reader.plan(new), strict=True):
            self._durations_s[clip] = np.nan
            if isinstance(plan, VideoError):
                bad[clip] = plan
            else:
                self._durations_s[clip] = plan.file.duration_s
                self.stats.tokens[clip] = plan.plan.num_tokens
                self._time_faults[clip] = list(time_problems(plan))
        return bad

    def _sample_problems(
        self, samples: Sequence[Sample], bad: dict[Media, VideoError]
    ) -> Iterator[Problem]:
        """Yield the problems of samples. An error of a file is reported with its first sample."""
        for sample in samples:
            for medium in sample.media:
                of = {"sample": sample.id, "video": medium.path}
                if error := bad.pop(medium, None):
                    yield Problem(**of, kind=error.kind, reason=str(error))
                for sentence in self._time_faults.pop(medium, ()):
                    yield Problem(**of, kind="times", reason=f"{medium.path}: {sentence}")
            of = {"sample": sample.id, "video": sample.first_path}
            for kind, reason in (
                *self._question_problems(cut_to_video(sample)),
                *self._interval_problems(sample),
            ):
                yield Problem(**of, kind=kind, reason=f"{sample.id}: {reason}")

    def _interval_problems(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """Yield (kind, sentence) for the intervals as annotated."""
        if sample.window_s is not None or not sample.duration_s:
            return
        for start_s, end_s in sample.intervals_s:
            self._times.add(sample.id, start_s, end_s, sample.duration_s)
            yield from interval_problems(start_s, end_s, sample.duration_s)

    def _question_problems(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """Yield (kind, sentence) for the question: duplicates, missing text, durations, tokens."""
        files = tuple(medium._replace(folder="") for medium in sample.media)
        question = hash((sample.task, files, sample.query, sample.options))
        if question in self._questions:
            about = " about the same files" if files else ""
            yield "duplicate", f"the same question{about} was asked before."
        elif sample.id in self._ids:
            yield "duplicate", "an earlier question of the file has the same id."
        self._questions.add(question)
        if self._has_own_ids:
            self._ids.add(sample.id)
        if sentence := self._limits.problem(sample):
            yield "annotation", sentence
        if any(not option for option in sample.options):
            yield "annotation", "an option has no text."
        if not sample.query:
            yield "annotation", "the question has no text; it is left out."
        if TASKS[sample.task].truth.intervals and not sample.intervals_s:
            yield "interval", "no interval within the video; the question is left out."
        if sample.clip and sample.window_s is None and sample.duration_s:
            yield from _durations(sample, self._durations_s[sample.clip])
        most = self._cfg.data.max_prompt_tokens
        tokens = sum(self.stats.tokens.get(medium, 0) for medium in sample.media)
        if tokens > most:
            yield "tokens", f"{tokens} vision tokens are over data.max_prompt_tokens={most}."


def _family(cfg: RunConfig) -> Family:
    """Return the family of the run's model; the first one if the model is not on this machine."""
    try:
        return family_of(architecture_of(cfg.model.checkpoint, cfg.model.architecture))
    except CheckpointError:
        return family_named(FAMILIES[0])


def _image_rules(cfg: RunConfig, family: Family) -> ImageRules:
    """Return the pixel limits of images: the family's if the checkpoint is not on this machine."""
    data = cfg.data
    return image_rules(
        hf_dir_of(cfg.model.checkpoint), family.pixels, data.image_min_pixels, data.image_max_pixels
    )


def _durations(sample: Sample, file_s: float) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) if annotated duration or intervals contradict the file."""
    slack_s = max(SLACK_S, SLACK_FRACTION * file_s)
    if abs(sample.duration_s - file_s) > slack_s:
        yield (
            "duration",
            f"annotated as {sample.duration_s:.2f} s, the file is {file_s:.2f} s long.",
        )
    for start_s, end_s in sample.intervals_s:
        if end_s > file_s + slack_s:
            yield (
                "interval",
                f"the true interval {start_s:.2f} to {end_s:.2f} s is not within the file's "
                f"{file_s:.2f} s.",
            )


def _records(source: Source) -> Iterator[tuple[str | int, Any, int]]:
    """Yield (key or index, record, line in a .jsonl file or 0)."""
    if is_list(source):
        for number, entry in enumerate(list_records(source)):
            yield number, entry.record, entry.line
        return
    content = load_records(source)
    if not isinstance(content, dict | list):
        raise DataError(f"{source.json_path} holds no sample.")
    keyed = content.items() if isinstance(content, dict) else enumerate(content)
    for key, record in keyed:
        yield key, record, 0
