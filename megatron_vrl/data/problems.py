"""Problem of a sample, as a row of quarantine.jsonl and of tools/check_data.py."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from megatron_vrl.errors import VideoError
from megatron_vrl.types import VideoSample

ANNOTATION_KINDS = {
    *("annotation", "unit", "interval", "zero_length", "reversed", "before_start", "duplicate")
}
NUM_FIRST = 3  # named in a summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    sample: str  # its id; "" if the problem is the file's or the record's
    video: str  # path or URL; "" if it is not known
    kind: str  # of VideoError, of ANNOTATION_KINDS, or duration, times, tokens
    reason: str  # one sentence

    @classmethod
    def of_video(cls, sample: VideoSample, error: VideoError) -> "Problem":
        """Return the problem of a sample whose video cannot be read."""
        return cls(sample=sample.id, video=sample.video, kind=error.kind, reason=str(error))

    def row(self) -> dict[str, str]:
        return asdict(self)


def summary(problems: Iterable[Problem]) -> str:
    """ "2 missing (first a.mp4, c.mp4), 1 cut_off (first b.mp4)", the most frequent kind first.

    Each kind names its first three videos, or samples where the annotation is at fault.
    """
    of_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        of_kind.setdefault(problem.kind, []).append(problem)
    by_number = sorted(of_kind.items(), key=lambda item: -len(item[1]))
    return ", ".join(
        f"{len(found)} {kind} (first {', '.join(dict.fromkeys(map(_name, found[:NUM_FIRST])))})"
        for kind, found in by_number
    )


def _name(problem: Problem) -> str:
    of_annotation = problem.kind in ANNOTATION_KINDS
    names = (problem.sample, problem.video) if of_annotation else (problem.video, problem.sample)
    return next(filter(None, names), problem.reason)
