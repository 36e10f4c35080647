"""Annotated times against the unit of their form: seconds, or shares of the video (0 to 1).

An interval is looked at alone for its order and its place in the video, and a whole file for its
unit: shares, milliseconds, percentages or frame numbers give themselves away only together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_vrl.config import Source

Unit = Literal["seconds", "shares"]
UNIT_WORDS = {"seconds": "seconds", "shares": "shares of the video (0 to 1)"}
SLACK_S, SLACK_SHARE = 1.0, 0.05  # published intervals run past the end by the larger one
SHARE_PAST = 0.3  # of a file's intervals past the end, over which its unit is doubted
SHARE_PAST_OF_FEW, FEW = 0.5, 10  # the same of a file with fewer intervals
SHORTEST_S = 2.0  # an interval of a shorter video may well end within its first second
MOST_FPS = 61.0  # frames of a second, at most
NUM_FIRST = 3  # ids named


def wrong_with(start_s: float, end_s: float, duration_s: float) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) of what is wrong with one annotated interval."""
    written = f"the annotated interval {start_s:.2f} to {end_s:.2f} s"
    if start_s == end_s:
        yield "zero_length", f"{written} has no length; readers drop it."
    elif start_s > end_s:
        yield "reversed", f"{written} ends before it starts; readers drop it."
    if start_s < 0:
        yield "before_start", f"{written} starts before the video; readers cut it there."
    if max(start_s, end_s) > duration_s + 1e-6:
        yield (
            "interval",
            f"{written} is not within the annotated {duration_s:.2f} s; readers cut it there.",
        )


@dataclass(slots=True)
class FileTimes:
    """Sums over the intervals of one file, from which `problem` tells a wrong unit."""

    source: Source
    unit: Unit
    count: int = 0
    past: list[str] = field(default_factory=list)  # ids whose interval ends far past the video
    is_whole: bool = True  # every time is a whole number
    latest: float = 0.0  # end, in the file's own unit
    most_of_duration: float = 0.0  # such an end as a multiple of its video's seconds
    all_in_duration: bool = True  # such ends lie within their video's seconds
    shortest_s: float = float("inf")  # video

    def add(self, name: str, start_s: float, end_s: float, duration_s: float) -> None:
        """Count one interval as a reader gives it, in seconds and not cut."""
        scale = duration_s if self.unit == "shares" else 1.0
        start, end = start_s / scale, max(start_s, end_s) / scale
        self.count += 1
        if max(start_s, end_s) > _with_slack(duration_s):
            self.past.append(name)
        self.is_whole &= all(abs(time - round(time)) < 1e-6 for time in (start, end))
        self.latest = max(self.latest, end)
        self.most_of_duration = max(self.most_of_duration, end / duration_s)
        self.all_in_duration &= end <= _with_slack(duration_s)
        self.shortest_s = min(self.shortest_s, duration_s)

    def problem(self) -> str:
        """Return what the whole file's times look like if they are not in its unit; else ""."""
        units = " or ".join(self._looks_like())
        if not units:
            return ""
        found = f"all {self.count} intervals end within the first second of their videos"
        if self.past:
            first = ", ".join(map(repr, self.past[:NUM_FIRST]))
            found = (
                f"{len(self.past)} of {self.count} intervals end past their video's end (first "
                f"{first})"
            )
        return (
            f"{self.source.json_path}: {found}: the times of {self.source.format} are "
            f"{UNIT_WORDS[self.unit]}, these look like {units}."
        )

    def _looks_like(self) -> Iterator[str]:
        if not self.count:
            return
        if self.unit == "seconds" and self.latest <= 1 and not self.is_whole:
            if self.shortest_s > SHORTEST_S:
                yield UNIT_WORDS["shares"]
            return
        most = SHARE_PAST if self.count >= FEW else SHARE_PAST_OF_FEW
        if len(self.past) <= most * self.count:
            return
        if self.unit == "shares" and self.all_in_duration:
            yield "seconds"
            return
        is_percent = self.latest <= 100
        is_frames = self.is_whole and self.most_of_duration <= MOST_FPS
        if is_percent:
            yield "percentages"
        if is_frames:
            yield "frame numbers"
        if not is_percent and not is_frames and self.most_of_duration <= 1000 * (1 + SLACK_SHARE):
            yield "milliseconds"


def _with_slack(duration_s: float) -> float:
    return duration_s + max(SLACK_S, SLACK_SHARE * duration_s)
