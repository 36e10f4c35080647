"""Tokenise one sample and its decoded video into a Prompt, for the trainer and the engine.

The checkpoint's chat template (`chat_template.py`) renders the video first and the text second. The
engine gets one pad token per vision block and expands it itself. The trainer gets one pad token per
vision token, in the form of the model's family (`PromptForm`). A block is a visual, or a temporal
step of a video with `PromptForm.step_blocks`. A prompt over data.max_prompt_tokens is an error:
cutting the prompt would drop vision tokens, and the rest would not match the video's grid.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.data.chat_template import ChatTokenizer, Message
from megatron_vrl.errors import CheckpointError, ConfigError, DataError
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import prompt_form
from megatron_vrl.tasks import SYSTEM_PROMPTS, TASKS
from megatron_vrl.tasks.answer import answer_block
from megatron_vrl.types import EncodedVideo, Prompt, VideoClip, VideoSample, Visual


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """The parts of a prompt before its videos and images are read."""

    id: str  # of the sample, for messages
    system: str | None  # system prompt; None: the default of the chat template
    videos: tuple[VideoClip | str, ...]
    images: tuple[str, ...] = ()  # paths; images follow the videos
    question: str


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

    def spec(self, sample: VideoSample) -> PromptSpec:
        """Return the system prompt, the clip and the question of a sample."""
        task = TASKS[sample.task]
        released = task.temporal_r1_question if self._wording == "temporal_r1" else None
        question = released or task.question
        return PromptSpec(
            id=sample.id,
            system=SYSTEM_PROMPTS[self._system_prompt],
            videos=(sample.clip,),
            question=self._form.explanation + question(sample),
        )

    def prompt(self, sample: VideoSample, video: EncodedVideo) -> Prompt:
        """Return the prompt of a sample. Raises what `encode` raises."""
        spec = self.spec(sample)
        return self.encode(spec.id, spec.system, (video,), spec.question)

    def encode(
        self, name: str, system: str | None, visuals: tuple[Visual, ...], question: str
    ) -> Prompt:
        """Return the prompt with all `visuals` in their order, then the question.

        `name` is the sample's id. `system` None: the system prompt of the chat template.
        Raises ConfigError if the prompt exceeds data.max_prompt_tokens, and DataError if a text
        has no encoding. Both name the sample.
        """
        check_text(name, system or "", question)
        compact = self._render(system, visuals, question)
        expanded = self._form.expand(compact, visuals, self._arch, self._chat.text_ids)
        token_ids = np.array(expanded, dtype=np.int64)
        if len(token_ids) > self._max_tokens:
            shown = int(np.isin(token_ids, self._pads).sum())
            raise ConfigError(
                f"The prompt of sample {name} has {len(token_ids)} tokens, {shown} of them "
                f"video, over data.max_prompt_tokens={self._max_tokens}: raise it, or lower "
                "video.total_pixels."
            )
        return Prompt(
            id=name,
            visuals=visuals,
            step_blocks=self._form.step_blocks,
            token_ids=token_ids,
            engine_token_ids=tuple(compact),
            positions=self._form.positions(token_ids, visuals, self._arch),
        )

    def target(self, sample: VideoSample) -> NDArray[np.int64]:
        """Return the tokens [R] of `target_text` with the stop token, the target of SFT.

        Raises DataError, naming the sample, if the text has no encoding.
        """
        text = self.target_text(sample)
        check_text(sample.id, text)
        return self.answer(text)

    def target_text(self, sample: VideoSample) -> str:
        """Return the ideal answer in the form that the system prompt asks for."""
        if self._system_prompt == "answer":
            sample = replace(sample, rationale="")
        text = TASKS[sample.task].target(sample)
        return answer_block(text) if self._system_prompt == "answer_only" else text

    def answer(self, text: str) -> NDArray[np.int64]:
        """Return the tokens [R] of `text`, read without special tokens, and the stop token."""
        return np.array([*self._chat.text_ids(text), self._stop], dtype=np.int64)

    def _render(self, system: str | None, visuals: tuple[Visual, ...], question: str) -> list[int]:
        """Return the token ids of the rendered chat, with one pad token per vision block."""
        shown = [part for visual in visuals for part in self._form.parts(visual)]
        kinds = [part["type"] for part in shown if part["type"] != "text"]
        content = [*shown, {"type": "text", "text": question}]
        messages: list[Message] = [{"role": "user", "content": content}]
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
