"""What flows: VideoSample -> EncodedVideo -> Prompt -> Rollout -> ScoredGroup -> Experience.

A stage that learns something makes the next type; it never fills a hole in an old one.
Shape letters: F frames, P prompt tokens, R response tokens, N rollouts of one group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]  # (start, end) in seconds

STRUCTURE_TOKENS = (  # of Qwen2.5-VL: special even where a tokenizer's files do not mark them
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class VideoClip(NamedTuple):
    """What is to be decoded: a whole file or a window of it."""

    path: str
    window_s: Interval | None = None  # (start, end) in the file's seconds; None: all of it
    folder: str = ""  # the file must lie in it, symlinks resolved; "": anywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSample:
    """One annotated question about one video, as a reader returns it.

    Example: VideoSample(id="clip_0001/0", task="temporal_grounding", video="/data/clip_0001.mp4",
    duration_s=16.0, query="the red square is visible", rationale="the red square is visible",
    intervals_s=((3.0, 7.0),), options=(), option="")
    """

    id: str  # unique within its split; "VIDEO/INDEX" for sets keyed by video
    task: str  # a row of `megatron_vrl.tasks.TASKS`
    video: str  # path of the file
    duration_s: float  # as annotated, seconds; 0 where a set of options alone does not say
    query: str  # the sentence to ground, or the question
    rationale: str  # what an ideal answer thinks; imitated by the SFT warm-up, "" if unknown
    intervals_s: tuple[Interval, ...]  # true intervals, seconds; () when the task has none
    options: tuple[str, ...]  # option texts in order; () when the task has none
    option: str  # letter of the right option, "A".."Z"; "" when the task has none
    truth: Any = None  # right answer of a task with a truth of its own: its `Truth.record`
    window_s: Interval | None = None  # part of the file that is shown; other times count from it
    folder: str = ""  # data folder, which the file must not leave; "": not asked for
    labels: tuple[str, ...] = ()  # "kind/name" groups that an evaluation reports apart

    @property
    def clip(self) -> VideoClip:
        return VideoClip(self.video, self.window_s, self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedVideo:
    """The one record made at decoding. Nothing downstream recomputes its time axis.

    `frames` are already resized, so their grid is the model's: height = grid_thw[1] * 14.
    An odd number of sampled frames is completed by repeating the last one, so
    F = 2 * grid_thw[0].
    """

    path: str
    digest: str  # hex digest of the file's bytes
    codec: str  # as the container names it, for example "h264"
    duration_s: float  # of the container's video stream, or of its window, seconds
    frame_indices: NDArray[np.int64]  # [F] in decoding order of presentation
    timestamps_s: NDArray[np.float64]  # [F] from the container's pts, seconds into the file
    sampled_fps: float  # frames sampled per second of video
    seconds_per_grid: float  # seconds between two temporal steps of the grid (2 frames each)
    grid_thw: tuple[int, int, int]  # temporal steps, height and width in patches of 14 px
    frame_budget: int  # most pixels one frame might have had under the sampling rule
    frames: NDArray[np.uint8]  # [F, height, width, 3] RGB


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A still picture, as one temporal step: the same frame twice, as Qwen encodes images."""

    path: str
    digest: str  # hex digest of the file's bytes
    grid_thw: tuple[int, int, int]  # 1; height and width in patches of 14 px
    frames: NDArray[np.uint8]  # [2, height, width, 3] RGB


Visual = EncodedVideo | EncodedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question rendered through the chat template, encoded once for engine and trainer."""

    id: str  # of its sample, for messages
    visuals: tuple[Visual, ...]  # in the order of their pad tokens; () for text alone
    token_ids: NDArray[np.int64]  # [P] with one pad token per merged vision cell
    engine_token_ids: tuple[int, ...]  # the same with one single pad per visual, as vLLM wants it
    positions: NDArray[np.int64]  # [3, P] M-RoPE positions: time, height, width
    seen: tuple[NDArray[Any], ...] = ()  # vision tokens [tokens, hidden] of each visual, if kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled answer."""

    token_ids: NDArray[np.int64]  # [R] ends with the stop token when finish == "stop"
    logprobs: NDArray[np.float32]  # [R] under the engine, at the sampling temperature
    text: str  # without special tokens
    finish: Literal["stop", "length"]
    weight_version: int  # of the weights that its prompt was read with
    newest_version: int  # of those of its last token: another if weights came in between
    seed: int  # that it was drawn with


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """An answer as its task's parser reads it; training rewards and evaluation share it."""

    interval_s: Interval | None = None  # start < end, inside the video, seconds
    option: str = ""  # letter of one of the sample's options
    value: Any = None  # answer to a task with a truth of its own; None when it cannot be read
    formatted: bool = False  # the response has exactly the format of the target, and can be read
    failure: str = ""  # why something that the task asks for could not be read


class RewardComponent(NamedTuple):
    """One reward component of a group's answers, and its weight in their total reward.

    Components of a task lie in [0, 1]; `overlong` lies in [-1, 0] and `kl` has any value.
    """

    values: NDArray[np.float64]  # [N]
    weight: float


def total_reward(components: Mapping[str, RewardComponent]) -> NDArray[np.float64]:
    """Return the weighted sum [N] of the components, added in their order.

    Example: format [1, 0] with weight 0.5 and temporal_iou [0.4, 0] with weight 0.5 -> [0.7, 0].
    """
    return sum_in_order([one.weight * one.values for one in components.values()])


def sum_in_order(terms: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the sum of at least one array, added from left to right: equal terms, equal sums."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """N answers to one prompt with their reward components."""

    sample: VideoSample
    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # N
    components: Mapping[str, RewardComponent]  # all that the advantages are made of, in order

    @property
    def total(self) -> NDArray[np.float64]:
        """Total rewards [N]: what is trained on, logged and stored."""
        return total_reward(self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A scored group with what its answers are worth beside each other."""

    scored: ScoredGroup
    advantages: NDArray[np.float64]  # [N]
