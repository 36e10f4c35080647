"""Samples -> decoded videos -> prompts, for training, evaluation, selection and the tools.

A video or image that cannot be read costs its own sample: `load` returns the VideoError
instead of the prompt, and the caller decides whether to skip, replace, count or raise. No process
group is used here. Code that runs on several ranks wraps the call in `raise_on_all_ranks`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron_vrl.data.prompt import PromptEncoder, PromptSpec
from megatron_vrl.errors import VideoError
from megatron_vrl.types import EncodedImage, EncodedVideo, Prompt, VideoClip, VideoSample, Visual


class VideoDecoder(Protocol):
    """Decoder of video files, such as `video.VideoReader`."""

    def encode(self, clips: Sequence[VideoClip | str]) -> list[EncodedVideo | VideoError]:
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

    def load(self, samples: Sequence[VideoSample]) -> list[Prompt | VideoError]:
        """Return the prompt of each sample, or the error of its video, in order.

        Raises ConfigError if a prompt exceeds data.max_prompt_tokens, DataError if a text has no
        encoding.
        """
        return self.load_specs([self._encoder.spec(sample) for sample in samples])

    def load_specs(self, specs: Sequence[PromptSpec]) -> list[Prompt | VideoError]:
        """Return the prompt of each spec, or the error of its first bad video or image, in order.

        Raises what `load` raises.
        """
        clips = [clip for spec in specs for clip in spec.videos]
        videos = iter(self._videos.encode(clips))
        return [self._prompt(spec, [next(videos) for _ in spec.videos]) for spec in specs]

    def _prompt(
        self, spec: PromptSpec, videos: Sequence[EncodedVideo | VideoError]
    ) -> Prompt | VideoError:
        visuals: list[Visual] = []
        try:
            for visual in (*videos, *self._images(spec)):
                if isinstance(visual, VideoError):
                    return visual
                visuals.append(visual)
        except VideoError as error:
            return error
        return self._encoder.encode(spec.id, spec.system, tuple(visuals), spec.question)

    def _images(self, spec: PromptSpec) -> Iterator[EncodedImage]:
        """Yield the images of a spec. Raises VideoError, naming the file, if one is damaged."""
        for path in spec.images:
            assert self._read_image is not None, "made without read_image"
            yield self._read_image(path)
