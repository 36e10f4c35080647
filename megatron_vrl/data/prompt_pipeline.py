"""Samples -> decoded videos -> prompts, for training, evaluation, selection and the tools.

A video or image that cannot be read costs its own sample: `load` returns the VideoError
instead of the prompt, and the caller decides whether to skip, replace, count or raise. No process
group is used here. Code that runs on several ranks wraps the call in `raise_on_all_ranks`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron_vrl.data.prompt import PromptEncoder, PromptSpec
from megatron_vrl.errors import VideoError
from megatron_vrl.types import EncodedImage, EncodedVideo, Media, Prompt, Sample, VideoClip, Visual


class VideoDecoder(Protocol):
    """Decoder of video files, such as `video.VideoReader`."""

    def encode(self, clips: Sequence[VideoClip]) -> list[EncodedVideo | VideoError]:
        """Return one result for each clip, in order."""
        ...


class PromptPipeline:
    """Decoder and prompt encoder of one process."""

    def __init__(
        self,
        videos: VideoDecoder,
        encoder: PromptEncoder,
        read_image: Callable[[str], EncodedImage] | None = None,
    ) -> None:
        """`read_image` is needed for specs with images only."""
        self._videos, self._encoder, self._read_image = videos, encoder, read_image

    def load(self, samples: Sequence[Sample]) -> list[Prompt | VideoError]:
        """Return the prompt of each sample, or the error of its video, in order.

        Raises ConfigError if a prompt exceeds data.max_prompt_tokens, DataError if a text has no
        encoding.
        """
        return self.load_specs([self._encoder.spec(sample) for sample in samples])

    def load_specs(self, specs: Sequence[PromptSpec]) -> list[Prompt | VideoError]:
        """Return the prompt of each spec, or the error of its first bad video or image, in order.

        Raises what `load` raises.
        """
        parts = [part for spec in specs for part in spec.content]
        videos = iter(self._videos.encode([p for p in parts if isinstance(p, VideoClip)]))
        return [self._prompt(spec, videos) for spec in specs]

    def _prompt(
        self, spec: PromptSpec, videos: Iterator[EncodedVideo | VideoError]
    ) -> Prompt | VideoError:
        """Return the prompt of a spec, whose videos are the next ones of `videos`."""
        content: list[str | Visual] = []
        errors: list[VideoError] = []
        for part in spec.content:
            read = part if isinstance(part, str) else self._visual(part, videos)
            if isinstance(read, VideoError):
                errors.append(read)
            else:
                content.append(read)
        return errors[0] if errors else self._encoder.encode(spec.id, spec.system, content)

    def _visual(
        self, medium: Media, videos: Iterator[EncodedVideo | VideoError]
    ) -> Visual | VideoError:
        """Return the next video, or the image of a file."""
        if isinstance(medium, VideoClip):
            return next(videos)
        assert self._read_image is not None, "made without read_image"
        try:
            return self._read_image(medium.path)
        except VideoError as error:
            return error
