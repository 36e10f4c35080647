"""Samples -> decoded videos -> prompts, for training, evaluation, selection and the tools.

A video or image that cannot be read costs its own sample: `load` returns the VideoError
instead of the prompt, and the caller decides whether to skip, replace, count or raise. No process
group is used here. Code that runs on several ranks wraps the call in `raise_on_all_ranks`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from megatron_vrl.data.prompt import PromptEncoder, PromptSpec
from megatron_vrl.errors import VideoError
from megatron_vrl.types import Media, Prompt, Sample, Visual


class MediaReader(Protocol):
    """Decoder of videos and images, such as `video.VideoReader`."""

    def read(self, media: Sequence[Media]) -> list[Visual | VideoError]:
        """Return one result for each medium, in order."""
        ...


class PromptPipeline:
    """Decoder and prompt encoder of one process."""

    def __init__(self, reader: MediaReader, encoder: PromptEncoder) -> None:
        self._reader, self._encoder = reader, encoder

    def load(self, samples: Sequence[Sample]) -> list[Prompt | VideoError]:
        """Return the prompt of each sample, or the error of its first bad video or image, in order.

        Raises ConfigError if a prompt exceeds data.max_prompt_tokens, DataError if a text has no
        encoding.
        """
        return self.load_specs([self._encoder.spec(sample) for sample in samples])

    def load_specs(self, specs: Sequence[PromptSpec]) -> list[Prompt | VideoError]:
        """Return the prompt of each spec, or the error of its first bad video or image, in order.

        Raises what `load` raises.
        """
        media = [part for spec in specs for part in spec.content if not isinstance(part, str)]
        read = iter(self._reader.read(media))
        return [self._prompt(spec, read) for spec in specs]

    def _prompt(self, spec: PromptSpec, read: Iterator[Visual | VideoError]) -> Prompt | VideoError:
        """Return the prompt of a spec, whose media are the next ones of `read`."""
        content = [part if isinstance(part, str) else next(read) for part in spec.content]
        errors = [part for part in content if isinstance(part, VideoError)]
        if errors:
            return errors[0]
        shown = [part for part in content if not isinstance(part, VideoError)]
        return self._encoder.encode(spec.id, spec.system, shown)
