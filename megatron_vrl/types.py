"""Data types of the pipeline, each made from the one before.

  Sample -> EncodedVideo -> Prompt -> Rollout -> ScoredGroup -> Experience

Every type is a frozen dataclass. A stage that adds information makes the next type; it never fills
a field of an existing object.

Letters in shapes: F frames, P prompt tokens, R response tokens, N rollouts of one group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]  # (start, end) in seconds


MEDIA_PLACE = "\ufffc"  # OBJECT REPLACEMENT CHARACTER: place of a video or an image in a text


class VideoClip(NamedTuple):
    """A video file, or a time window of it."""

    path: str
    window_s: Interval | None = None  # (start, end) in seconds of the file; None: whole file
    folder: str = ""  # the file must be inside it, symlinks resolved; "": not checked


class ImageFile(NamedTuple):
    """An image file."""

    path: str
    folder: str = ""  # the file must be inside it, symlinks resolved; "": not checked


Media = VideoClip | ImageFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One annotated question about any number of videos and images.

    Each MEDIA_PLACE in `query` and `options` is the place of the next medium. Without such a
    character all media come before the text.

    Example: Sample(id="clip_0001/0", task="temporal_grounding",
    media=(VideoClip("/data/clip_0001.mp4"),), duration_s=16.0, query="the red square is visible",
    rationale="the red square is visible", intervals_s=((3.0, 7.0),), options=(), option="")
    """

    id: str  # unique within its split; "VIDEO/INDEX" in annotations keyed by video
    task: str  # a key of `megatron_vrl.tasks.TASKS`
    media: tuple[Media, ...]  # in the order shown; () for a text-only sample
    duration_s: float  # annotated duration of the only video, seconds; 0 if there is none
    query: str  # the sentence to ground, or the question
    rationale: str  # thinking text of the SFT target; "" if unknown
    intervals_s: tuple[Interval, ...]  # ground truth, seconds; () when the task has none
    options: tuple[str, ...]  # option texts in order; () when the task has none
    option: str  # letter of the correct option, "A".."Z"; "" when the task has none
    truth: Any = None  # ground truth of a task with its own kind of truth: its `Truth.record`
    labels: tuple[str, ...] = ()  # "kind/name" categories that an evaluation reports separately

    @property
    def clips(self) -> tuple[VideoClip, ...]:
        """Return the videos in the order shown."""
        return tuple(medium for medium in self.media if isinstance(medium, VideoClip))

    @property
    def clip(self) -> VideoClip | None:
        """Return the only video; None if the sample has none or several."""
        return self.clips[0] if len(self.clips) == 1 else None

    @property
    def first_path(self) -> str:
        """Return the path of the first video or image; "" for a text-only sample."""
        return self.media[0].path if self.media else ""

    @property
    def window_s(self) -> Interval | None:
        """Return the shown part of the only video. Other times count from its start."""
        return self.clip.window_s if self.clip else None

    def inside(self, folder: str) -> "Sample":
        """Return the sample whose files must be inside `folder`, except those with a folder."""
        media = [one if one.folder else one._replace(folder=folder) for one in self.media]
        return replace(self, media=tuple(media))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedVideo:
    """Decoded and resized frames of one clip, with their time axis.

    The time axis (indices, timestamps, rates) is computed once, at decoding. No later stage
    recomputes it.

    `frames` have the model's input size: height and width are grid_thw[1] and grid_thw[2] times the
    side of a patch. If the number of sampled frames is odd, the last frame is repeated, so F = 2 *
    grid_thw[0].

    Example: a 16 s clip at 30 frames per second, sampled at 2 frames per second, has F = 32 and
    grid_thw[0] = 16 with 1 s per temporal step.
    """

    path: str
    digest: str  # hex digest of the file's bytes
    codec: str  # FFmpeg's name of the codec, for example "h264"
    duration_s: float  # duration of the video stream, or of the window, seconds
    frame_indices: NDArray[np.int64]  # [F] frame numbers in the file, in presentation order
    timestamps_s: NDArray[np.float64]  # [F] from the container's pts; 0: first frame
    sampled_fps: float  # frames sampled per second of video
    seconds_per_grid: float  # seconds per temporal step (2 frames)
    grid_thw: tuple[int, int, int]  # temporal steps, height and width in patches
    frame_budget: int  # maximum pixels per frame under the sampling rule
    frames: NDArray[np.uint8]  # [F, height, width, 3] RGB


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image as one temporal step: the frame is repeated once, as processors encode images."""

    path: str
    digest: str  # hex digest of the file's bytes
    grid_thw: tuple[int, int, int]  # (1, height, width), the latter two in patches
    frames: NDArray[np.uint8]  # [2, height, width, 3] RGB


Visual = EncodedVideo | EncodedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question rendered by the chat template and tokenized, with its videos and images.

    The rollout engine and the trainer use the same Prompt. The engine takes `engine_token_ids` with
    one pad token per vision block and expands it; the trainer takes `token_ids`, which are
    expanded. A block is a visual, or with `step_blocks` a temporal step of a video.
    """

    id: str  # id of its sample
    visuals: tuple[Visual, ...]  # in the order of their pad tokens; () for a text-only prompt
    token_ids: NDArray[np.int64]  # [P] with one pad token per merged vision patch
    engine_token_ids: tuple[int, ...]  # with one pad token per vision block, as vLLM expects
    positions: NDArray[np.int64]  # [3, P] M-RoPE positions: time, height, width
    visual_embeds: tuple[NDArray[Any], ...] = ()  # [tokens, hidden] per visual; (): not computed
    step_blocks: bool = False  # text stands between the temporal steps of each video


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualInput:
    """One vision block as an engine receives it: pixels, or embeddings from the trainer's tower."""

    kind: Literal["video", "image"]  # vLLM's modality
    frames: NDArray[np.uint8]  # [F, height, width, 3] RGB, resized; F is 0 with embeddings
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float  # 0 for an image
    timestamps_s: NDArray[np.float64]  # [F] of all frames, also with embeddings; [0] for an image
    embeddings: NDArray[Any] | None = None  # [vision tokens, channels]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled answer with its log-probs."""

    token_ids: NDArray[np.int64]  # [R] ends with the stop token when finish == "stop"
    logprobs: NDArray[np.float32]  # [R] computed by the engine at the sampling temperature
    text: str  # without special tokens
    finish: Literal["stop", "length"]
    weight_version: int  # weight version when the engine processed the prompt
    newest_version: int  # weight version at the last token; larger if weights were synced meanwhile
    seed: int  # sampling seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """An answer as its task's parser reads it; training rewards and evaluation share it."""

    interval_s: Interval | None = None  # start < end, inside the video, seconds
    intervals_s: tuple[Interval, ...] = ()  # answer to a task that asks for all; ordered by start
    option: str = ""  # letter of one of the sample's options
    value: Any = None  # answer to a task with a truth of its own; None when it cannot be read
    formatted: bool = False  # the response has exactly the format of the target, and can be read
    failure: str = ""  # why something that the task asks for could not be read

    @property
    def shown_intervals_s(self) -> tuple[Interval, ...]:
        """Return every interval of the answer, for logs and pictures."""
        return self.intervals_s or ((self.interval_s,) if self.interval_s else ())


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
class AnnotatedAnswer:
    """The ideal answer to a prompt, which joins its group as an off-policy answer."""

    token_ids: NDArray[np.int64]  # [R] ends with the stop token
    rewards: Mapping[str, float]  # reward components of its text


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """N answers to one prompt with their reward components."""

    sample: Sample
    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # N
    components: Mapping[str, RewardComponent]  # all that the advantages are made of, in order
    annotation: AnnotatedAnswer | None = None  # trained on beside the rollouts

    @property
    def total(self) -> NDArray[np.float64]:
        """Total rewards [N]: what is trained on, logged and stored."""
        return total_reward(self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A scored group with the advantages of its answers."""

    scored: ScoredGroup
    advantages: NDArray[np.float64]  # [N]
    annotation_advantage: float = 0.0
