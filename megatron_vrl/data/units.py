"""Detects annotated times in a wrong unit. A format's times are seconds or fractions of the video.

Order and bounds are checked for each interval. The unit is checked for the whole file: fractions,
milliseconds, percentages and frame numbers can only be recognized from many intervals together.

Example: 40 of 100 intervals of a charades_sta file end after their video, all times are at most
100, and some are not whole: "these look like percentages".
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_vrl.config import Source

Unit = Literal["seconds", "fraction"]
UNIT_NAMES = {"seconds": "seconds", "fraction": "fractions of the video (0 to 1)"}
SLACK_S, SLACK_FRACTION = 1.0, 0.05  # tolerance past the video's end: the larger of the two
MAX_FRACTION_PAST = 0.3  # more intervals than this past the end: the unit is doubted
MAX_FRACTION_PAST_OF_FEW, FEW = 0.5, 10  # this limit for a file with fewer than FEW intervals
SHORTEST_S = 2.0  # in a shorter video, intervals that end in the first second are normal
MAX_FPS = 61.0  # maximum frames per second
NUM_FIRST = 3  # number of ids in a message


def interval_problems(start_s: float, end_s: float, duration_s: float) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for each problem of one annotated interval."""
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
    """Statistics over the intervals of one file, from which `problem` recognizes a wrong unit."""

    source: Source
    unit: Unit
    count: int = 0
    past: list[str] = field(default_factory=list)  # ids of intervals past the end and its tolerance
    is_whole: bool = True  # every time is a whole number
    latest: float = 0.0  # latest end in the file's unit
    most_of_duration: float = 0.0  # maximum of end (file's unit) / duration of the video (s)
    all_in_duration: bool = True  # every end (file's unit) is at most the duration (s)
    shortest_s: float = float("inf")  # shortest video

    def add(self, name: str, start_s: float, end_s: float, duration_s: float) -> None:
        """Add one uncut interval, in seconds."""
        scale = duration_s if self.unit == "fraction" else 1.0
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
        """Return a sentence if the times of the file are not in the unit of its format, else ""."""
        units = " or ".join(self._looks_like())
        if not units:
            return ""
        evidence = f"all {self.count} intervals end within the first second of their videos"
        if self.past:
            first = ", ".join(map(repr, self.past[:NUM_FIRST]))
            evidence = (
                f"{len(self.past)} of {self.count} intervals end past their video's end (first "
                f"{first})"
            )
        return (
            f"{self.source.json_path}: {evidence}: the times of {self.source.format} are "
            f"{UNIT_NAMES[self.unit]}, these look like {units}."
        )

    def _looks_like(self) -> Iterator[str]:
        """Yield the units that the times seem to have, if the configured unit is wrong."""
        if not self.count:
            return
        if self.unit == "seconds" and self.latest <= 1 and not self.is_whole:
            if self.shortest_s > SHORTEST_S:
                yield UNIT_NAMES["fraction"]
            return
        most = MAX_FRACTION_PAST if self.count >= FEW else MAX_FRACTION_PAST_OF_FEW
        if len(self.past) <= most * self.count:
            return
        if self.unit == "fraction" and self.all_in_duration:
            yield "seconds"
            return
        is_percent = self.latest <= 100
        is_frames = self.is_whole and self.most_of_duration <= MAX_FPS
        if is_percent:
            yield "percentages"
        if is_frames:
            yield "frame numbers"
        if (
            not is_percent
            and not is_frames
            and self.most_of_duration <= 1000 * (1 + SLACK_FRACTION)
        ):
            yield "milliseconds"


def _with_slack(duration_s: float) -> float:
    """Return the duration with the tolerance added, in seconds."""
    return duration_s + max(SLACK_S, SLACK_FRACTION * duration_s)
