"""What a task is: how it asks, how an ideal model answers, and how an answer is read."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_vrl.types import Interval, VideoSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """An answer as the strict parser reads it; training rewards and evaluation share it."""

    interval_s: Interval | None = None  # start < end, inside the video, seconds
    option: str = ""  # letter of one of the sample's options
    formatted: bool = False  # the response has exactly the form of the target, and reads
    failure: str = ""  # why something the task asks for could not be read


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    name: str
    parts: tuple[str, ...]  # rows of `megatron_vrl.rewards.PARTS`
    question: Callable[[VideoSample], str]  # the user turn's text, after the video
    temporal_r1_question: Callable[[VideoSample], str]  # as released, where that was; else the same
    target: Callable[[VideoSample], str]  # the ideal response, without the stop token
    parse: Callable[[str, VideoSample], Parsed]  # never raises: see Parsed.failure
