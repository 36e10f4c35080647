"""Most videos and images of a sample: `data.max_videos` and `data.max_images`.

A sample with more is refused when the annotations are read, before a video is opened.
"""

from collections.abc import Iterable
from typing import NamedTuple

from megatron_vrl.config import Data, Source
from megatron_vrl.errors import DataError, counted
from megatron_vrl.types import Sample


class MediaLimits(NamedTuple):
    """Most videos and images of a sample."""

    videos: int
    images: int

    def problem(self, sample: Sample) -> str:
        """Return a sentence if the sample has more media; "" if it does not."""
        videos = len(sample.clips)
        for key, noun, count, most in (
            ("max_videos", "video", videos, self.videos),
            ("max_images", "image", len(sample.media) - videos, self.images),
        ):
            if count > most:
                return (
                    f"it has {counted(count, noun)}, over data.{key}={most}: leave the sample out, "
                    "or raise the limit."
                )
        return ""

    def check(self, samples: Iterable[Sample], source: Source) -> None:
        """Raise DataError, naming file and sample, for the first sample with more media."""
        for sample in samples:
            if sentence := self.problem(sample):
                raise DataError(f"{source.json_path}: record {sample.id!r}: {sentence}")


def limits_of(data: Data) -> MediaLimits:
    """Return the limits of a configuration."""
    return MediaLimits(videos=data.max_videos, images=data.max_images)


DEFAULT_LIMITS = limits_of(Data())
