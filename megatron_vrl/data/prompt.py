"""Tokenise one sample and its decoded media into a Prompt, for the trainer and the engine.

The checkpoint's chat template (`chat_template.py`) renders texts, videos and images in the order of
the sample: media stand at the MEDIA_PLACEs of the question, or before a question without one. The
engine gets one pad token per vision block and expands it itself. The trainer gets one pad token per
vision token, in the form of the model's family (`PromptForm`). A block is a visual, or a temporal
step of a video with `PromptForm.step_blocks`. A prompt over data.max_prompt_tokens is an error:
cutting the prompt would drop vision tokens, and the rest would not match the video's grid.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.data.chat_template import ChatTokenizer, Message
from megatron_vrl.errors import CheckpointError, ConfigError, DataError, counted
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import prompt_form
from megatron_vrl.tasks import SYSTEM_PROMPTS, TASKS
from megatron_vrl.tasks.answer import answer_block
from megatron_vrl.types import MEDIA_PLACE, EncodedVideo, Media, Prompt, Sample, Visual


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """The parts of a prompt before its videos and images are read."""

    id: str  # of the sample, for messages
    system: str | None  # system prompt; None: the default of the chat template
    content: tuple[str | Media, ...]  # texts, videos and images of the user turn, in order


class PromptEncoder:
    """Tokenizer and chat template of one checkpoint, with one system prompt."""

    def __init__(
        self,
        hf_dir: str | Path,
        arch: Architecture,
        system_prompt: str,
        max_tokens: int,
        wording: Literal["default", "temporal_r1"] = "default",
        timestamps: Literal["none", "interleaved"] = "none",
    ) -> None:
        """Raises CheckpointError if the tokenizer or the chat template cannot be used."""
        self._arch, self._form = arch, prompt_form(family_of(arch), timestamps)
        self._pads = (arch.video_token, arch.image_token)
        self._chat = ChatTokenizer(hf_dir, self._pads, self._form.structure_tokens)
        self.tokenizer = self._chat.tokenizer
        self._system_prompt = system_prompt
        self._max_tokens = max_tokens
        self._wording = wording
        self._stop = self.tokenizer.convert_tokens_to_ids(self._form.stop_tokens[0])

    def spec(self, sample: Sample) -> PromptSpec:
        """Return the system prompt, the media and the question of a sample.

        Raises DataError if the question has places for another number of media.
        """
        task = TASKS[sample.task]
        released = task.temporal_r1_question if self._wording == "temporal_r1" else None
        question = released or task.question
        text = (self._form.explanation if sample.clips else "") + question(sample)
        return PromptSpec(
            id=sample.id,
            system=SYSTEM_PROMPTS[self._system_prompt],
            content=placed(sample.id, text, sample.media),
        )

    def prompt(self, sample: Sample, *visuals: Visual) -> Prompt:
        """Return the prompt of a sample with its media read. Raises what `encode` raises."""
        spec = self.spec(sample)
        return self.encode(spec.id, spec.system, shown(spec.content, visuals))

    def encode(self, name: str, system: str | None, content: Sequence[str | Visual]) -> Prompt:
        """Return the prompt with the texts and visuals of `content` in their order.

        `name` is the sample's id. `system` None: the system prompt of the chat template.
        Raises ConfigError if the prompt exceeds data.max_prompt_tokens, and DataError if a text
        has no encoding. Both name the sample.
        """
        check_text(name, system or "", *(part for part in content if isinstance(part, str)))
        visuals = tuple(part for part in content if not isinstance(part, str))
        compact = self._render(system, content)
        expanded = self._form.expand(compact, visuals, self._arch, self._chat.text_ids)
        token_ids = np.array(expanded, dtype=np.int64)
        if len(token_ids) > self._max_tokens:
            vision = int(np.isin(token_ids, self._pads).sum())
            raise ConfigError(
                f"The prompt of sample {name} has {len(token_ids)} tokens, {vision} of them "
                f"vision, over data.max_prompt_tokens={self._max_tokens}: raise it, or "
                f"{_shorter(visuals)}."
            )
        return Prompt(
            id=name,
            visuals=visuals,
            step_blocks=self._form.step_blocks,
            token_ids=token_ids,
            engine_token_ids=tuple(compact),
            positions=self._form.positions(token_ids, visuals, self._arch),
        )

    def target(self, sample: Sample) -> NDArray[np.int64]:
        """Return the tokens [R] of `target_text` with the stop token, the target of SFT.

        Raises DataError, naming the sample, if the text has no encoding.
        """
        text = self.target_text(sample)
        check_text(sample.id, text)
        return self.answer(text)

    def target_text(self, sample: Sample) -> str:
        """Return the ideal answer in the form that the system prompt asks for."""
        if self._system_prompt == "answer":
            sample = replace(sample, rationale="")
        text = TASKS[sample.task].target(sample)
        return answer_block(text) if self._system_prompt == "answer_only" else text

    def answer(self, text: str) -> NDArray[np.int64]:
        """Return the tokens [R] of `text`, read without special tokens, and the stop token."""
        return np.array([*self._chat.text_ids(text), self._stop], dtype=np.int64)

    def _render(self, system: str | None, content: Sequence[str | Visual]) -> list[int]:
        """Return the token ids of the rendered chat, with one pad token per vision block."""
        parts: list[dict[str, str]] = []
        for one in content:
            parts += (
                [{"type": "text", "text": one}] if isinstance(one, str) else self._form.parts(one)
            )
        kinds = [part["type"] for part in parts if part["type"] != "text"]
        messages: list[Message] = [{"role": "user", "content": parts}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = self._chat.turn_ids(messages)
        pads = dict(zip(("video", "image"), self._pads, strict=True))
        if [token for token in ids if token in self._pads] != [pads[kind] for kind in kinds]:
            raise CheckpointError(
                f"{self._chat.directory}: its chat template does not show "
                f"{', '.join(dict.fromkeys(kinds))} as one pad token each, in their order; take "
                "the template of the released model."
            )
        return ids


def placed(name: str, text: str, media: Sequence[Media]) -> tuple[str | Media, ...]:
    """Return the text with `media` at its MEDIA_PLACEs, or all media first if it has none.

    Example: "Is \ufffc or \ufffc red?" and (a, b) -> ("Is ", a, " or ", b, " red?"). Raises
    DataError, naming the sample, if the numbers of places and media differ.
    """
    before, *after = text.split(MEDIA_PLACE)
    if not after:
        return (*media, text)
    if len(after) != len(media):
        raise DataError(
            f"The question of sample {name} has {counted(len(after), 'place')} (U+FFFC) for "
            f"videos and images, and the sample has {len(media)} of them: correct the annotation."
        )
    content = (before, *chain.from_iterable(zip(media, after, strict=True)))
    return tuple(part for part in content if part)


def shown(content: Sequence[str | Media], visuals: Iterable[Visual]) -> tuple[str | Visual, ...]:
    """Return `content` with `visuals`, which are in its order, in place of the files."""
    remaining = iter(visuals)
    return tuple(part if isinstance(part, str) else next(remaining) for part in content)


def _shorter(visuals: Sequence[Visual]) -> str:
    """Return what makes a prompt with these media shorter."""
    kinds = {isinstance(visual, EncodedVideo) for visual in visuals}
    keys = {True: "video.total_pixels", False: "data.image_max_pixels"}
    named = " and ".join(key for is_video, key in keys.items() if is_video in kinds)
    return f"lower {named}" if named else "leave the sample out"


def check_text(name: str, *texts: str) -> None:
    """Raises DataError, naming the sample, if a text holds half of a surrogate pair."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"The text of sample {name} holds {text[error.start]!r}, half of a surrogate pair "
                "and no character: correct the annotation."
            ) from None
