"""A whole dataset looked over before a run: annotations, files, durations, intervals, duplicates.

Problems come in the form of quarantine.jsonl. A file is probed once, in the processes that decode
in a run, so what hangs there is found here. Left out: whether answers are right, and damage inside
the compressed pictures, unless everything is decoded too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from megatron_vrl.config import RunConfig, Source
from megatron_vrl.data.formats.training import (
    READERS,
    is_list,
    list_records,
    load_records,
    refuse_other_form,
    samples_of,
    within,
)
from megatron_vrl.data.problems import Problem
from megatron_vrl.data.units import FileTimes, wrong_with
from megatron_vrl.errors import DataError, VideoError
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import VideoClip, VideoSample
from megatron_vrl.video import VideoReader
from megatron_vrl.video.time_axis import problems_of_times

AT_A_TIME = 256  # samples whose files are probed together
SLACK_S, SLACK_SHARE = 1.0, 0.05  # annotated and real durations may differ by the larger one


@dataclass(slots=True)
class Checked:
    """What was seen besides problems."""

    samples: int = 0
    tokens: dict[VideoClip, int] = field(default_factory=dict)  # of each video that can be read


def distinct_sources(cfg: RunConfig) -> list[Source]:
    """Of every phase and split, each file once."""
    evaluated = [source for sources in cfg.data.evaluation.values() for source in sources]
    sources = [*cfg.data.sft, *cfg.data.train, *evaluated]
    return list({(s.json_path, s.data_folder, s.format): s for s in sources}.values())


def num_records(source: Source) -> int:
    """Raises DataError if the file cannot be read, is of another form or holds no record."""
    refuse_other_form(source)
    count = sum(1 for _ in _records(source))
    if not count:
        raise DataError(f"{source.json_path} holds no sample.")
    return count


class DatasetCheck:
    """`problems` of one source after the other; duplicates are found across them."""

    def __init__(self, cfg: RunConfig, decode: bool):
        """`decode`: also decode every video as a run would."""
        video = cfg.video if decode else cfg.video.model_copy(update={"decoder": "pyav"})
        self.seen = Checked()
        self._cfg, self._decode = cfg, decode
        self._reader = VideoReader(video)
        self._durations_s: dict[VideoClip, float] = {}
        self._time_faults: dict[VideoClip, list[str]] = {}  # that were not told yet
        self._questions: set[int] = set()
        self._ids: set[str] = set()  # of one source

    def problems(self, source: Source) -> Iterator[list[Problem]]:
        """Of each record, in order. Raises DataError if the file cannot be read at all."""
        records = _records(source)
        self._times = FileTimes(source, READERS[source.format].unit)
        self._ids.clear()
        self._seen_before = self.seen.samples
        self._has_own_ids = not READERS[source.format].by_file
        while some := list(islice(records, AT_A_TIME)):
            read = [self._read(*one, source) for one in some]
            files = self._files([sample for samples, _ in read for sample in samples])
            for samples, found in read:
                yield [*found, *self._of_samples(samples, files)]

    def of_file(self) -> list[Problem]:
        """Return the problems of a whole file, after `problems` has yielded its last record."""
        found = {"unit": self._times.problem()}
        if self.seen.samples == self._seen_before:
            found["annotation"] = f"{self._times.source.json_path} holds no sample."
        return [
            Problem(sample="", video="", kind=kind, reason=sentence)
            for kind, sentence in found.items()
            if sentence
        ]

    def _read(
        self, key: str | int, record: Any, line: int, source: Source
    ) -> tuple[list[VideoSample], list[Problem]]:
        try:
            read = samples_of(record, key, source, self._reader.duration_s, line)
        except DataError as error:
            return [], [Problem(sample="", video="", kind="annotation", reason=str(error))]
        except VideoError as error:
            reason = f"{source.json_path}: record {key}: its video {error}"
            return [], [Problem(sample="", video="", kind=error.kind, reason=reason)]
        self.seen.samples += len(read)
        return [replace(sample, folder=source.data_folder) for sample in read], []

    def _files(self, samples: Sequence[VideoSample]) -> dict[VideoClip, VideoError]:
        """What is wrong with files that were not seen before."""
        new = [f for f in dict.fromkeys(s.clip for s in samples) if f not in self._durations_s]
        bad: dict[VideoClip, VideoError] = {}
        for clip, plan in zip(new, self._reader.plan(new), strict=True):
            self._durations_s[clip] = np.nan
            if isinstance(plan, VideoError):
                bad[clip] = plan
            else:
                self._durations_s[clip] = plan.file.duration_s
                self.seen.tokens[clip] = plan.plan.num_tokens
                self._time_faults[clip] = list(problems_of_times(plan))
        if self._decode:
            good = [clip for clip in new if clip not in bad]
            decoded = zip(good, self._reader.encode(good), strict=True)
            bad |= {clip: video for clip, video in decoded if isinstance(video, VideoError)}
        return bad

    def _of_samples(
        self, samples: Sequence[VideoSample], bad: dict[VideoClip, VideoError]
    ) -> Iterator[Problem]:
        for sample in samples:
            of = {"sample": sample.id, "video": sample.video}
            if error := bad.pop(sample.clip, None):
                yield Problem(**of, kind=error.kind, reason=str(error))
            for sentence in self._time_faults.pop(sample.clip, ()):
                yield Problem(**of, kind="times", reason=f"{sample.video}: {sentence}")
            for kind, reason in (*self._of_sample(within(sample)), *self._of_times(sample)):
                yield Problem(**of, kind=kind, reason=f"{sample.id}: {reason}")

    def _of_times(self, sample: VideoSample) -> Iterator[tuple[str, str]]:
        """(kind, what is wrong) of the intervals as they are written."""
        if sample.window_s is not None or not sample.duration_s:
            return
        for start_s, end_s in sample.intervals_s:
            self._times.add(sample.id, start_s, end_s, sample.duration_s)
            yield from wrong_with(start_s, end_s, sample.duration_s)

    def _of_sample(self, sample: VideoSample) -> Iterator[tuple[str, str]]:
        """(kind, what is wrong)"""
        question = hash((sample.task, sample.video, sample.window_s, sample.query, sample.options))
        if question in self._questions:
            yield "duplicate", "the same question about the same video was asked before."
        elif sample.id in self._ids:
            yield "duplicate", "an earlier question of the file has the same id."
        self._questions.add(question)
        if self._has_own_ids:
            self._ids.add(sample.id)
        if any(not option for option in sample.options):
            yield "annotation", "an option has no text."
        if not sample.query:
            yield "annotation", "the question has no text; it is left out."
        if TASKS[sample.task].truth.intervals and not sample.intervals_s:
            yield "interval", "no interval within the video; the question is left out."
        if sample.window_s is None and sample.duration_s:
            yield from _durations(sample, self._durations_s[sample.clip])
        most, tokens = self._cfg.data.max_prompt_tokens, self.seen.tokens.get(sample.clip, 0)
        if tokens > most:
            yield "tokens", f"{tokens} video tokens are over data.max_prompt_tokens={most}."


def _durations(sample: VideoSample, file_s: float) -> Iterator[tuple[str, str]]:
    slack_s = max(SLACK_S, SLACK_SHARE * file_s)
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
    """(key or number, record, line of a .jsonl file or 0)"""
    if is_list(source):
        for number, found in enumerate(list_records(source)):
            yield number, found.record, found.line
        return
    content = load_records(source)
    if not isinstance(content, dict | list):
        raise DataError(f"{source.json_path} holds no sample.")
    keyed = content.items() if isinstance(content, dict) else enumerate(content)
    for key, record in keyed:
        yield key, record, 0
