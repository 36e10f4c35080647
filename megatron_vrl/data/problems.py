"""Problem: the record that quarantine.jsonl and tools/check_data.py write about an unusable sample.

The states of a bad sample in training:

  DRAWN -> RETRIED       the video fails and is tried `video.retries` more times
        -> QUARANTINED   one row in quarantine.jsonl; the next sample of the stream replaces it
        -> run ends      when more than `video.max_bad_fraction` of all drawn samples are bad

Example row: {"sample": "clip_7/0", "video": "/data/clip_7.mp4", "kind": "cut_off", "reason":
"/data/clip_7.mp4 is cut off after 3.10 of 16.00 s; replace it."}
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from megatron_vrl.errors import VideoError
from megatron_vrl.types import Sample

ANNOTATION_KINDS = {
    *("annotation", "unit", "interval", "zero_length", "reversed", "before_start", "duplicate")
}
NUM_FIRST = 3  # examples per kind in a summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One sample or record that cannot be used, with the reason."""

    sample: str  # id of the sample; "" for a problem of a whole file or record
    video: str  # path or URL of the video or image; "" if unknown
    kind: str  # VideoError.kind, one of ANNOTATION_KINDS, or duration, times, tokens
    reason: str  # one sentence

    @classmethod
    def of_video(cls, sample: Sample, error: VideoError) -> "Problem":
        """Return the problem of a sample with a video or an image that cannot be read."""
        file = error.path or sample.first_path
        return cls(sample=sample.id, video=file, kind=error.kind, reason=str(error))

    def row(self) -> dict[str, str]:
        """Return the row for a JSON lines file."""
        return asdict(self)


def summary(problems: Iterable[Problem]) -> str:
    """Return counts and examples by kind, the most frequent kind first.

    Example: "2 missing (first a.mp4, c.mp4), 1 cut_off (first b.mp4)". Each kind names its first
    three videos, or samples if the annotation is at fault.
    """
    of_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        of_kind.setdefault(problem.kind, []).append(problem)
    by_number = sorted(of_kind.items(), key=lambda item: -len(item[1]))
    return ", ".join(
        f"{len(group)} {kind} (first {', '.join(dict.fromkeys(map(_name, group[:NUM_FIRST])))})"
        for kind, group in by_number
    )


def _name(problem: Problem) -> str:
    """Return the video or the sample to name in a summary."""
    of_annotation = problem.kind in ANNOTATION_KINDS
    names = (problem.sample, problem.video) if of_annotation else (problem.video, problem.sample)
    return next(filter(None, names), problem.reason)
