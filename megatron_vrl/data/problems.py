"""What is wrong with a sample, in the one form of quarantine.jsonl and of tools/check_data.py."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    sample: str  # its id; "" if the problem is the file's or the record's
    video: str  # path or URL; "" if it is not known
    kind: str  # a kind of VideoError; or annotation, duration, times, interval, duplicate
    reason: str  # one sentence

    def row(self) -> dict[str, str]:
        return asdict(self)


def summary(problems: Iterable[Problem]) -> str:
    """ "3 missing (first a.mp4), 1 cut_off (first b.mp4)", the most frequent kind first."""
    of_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        of_kind.setdefault(problem.kind, []).append(problem)
    by_number = sorted(of_kind.items(), key=lambda item: -len(item[1]))
    return ", ".join(
        f"{len(found)} {kind} (first {found[0].video or found[0].sample})"
        for kind, found in by_number
    )
