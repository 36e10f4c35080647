"""Sample + encoded video -> Prompt: the one place where a question becomes tokens.

The chat template of the checkpoint renders it (`chat.py`), video first, text second; the same ids
feed the engine (one pad token, which it expands itself) and the trainer (one per vision cell). A
prompt that is too long is refused: cutting it would drop vision tokens and break the match with the
video's grid.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.batching.positions import VisionBlock, mrope_positions
from megatron_vrl.data.chat_template import STOP, ChatTokenizer, Message
from megatron_vrl.errors import CheckpointError, ConfigError, DataError
from megatron_vrl.tasks import SYSTEM_PROMPTS, TASKS
from megatron_vrl.types import EncodedVideo, Prompt, VideoSample, Visual


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTokens:
    """What the checkpoint's config says of vision in a prompt."""

    video_token: int
    image_token: int
    merge: int  # patches per side of one token
    tokens_per_second: float


class PromptEncoder:
    """Tokenizer and template of one checkpoint under one system prompt."""

    def __init__(
        self,
        hf_dir: str | Path,
        vision: VisionTokens,
        system_prompt: str,
        max_tokens: int,
        wording: Literal["default", "temporal_r1"] = "default",
    ) -> None:
        """Raises CheckpointError if tokenizer or chat template do not serve."""
        self._pads = (vision.video_token, vision.image_token)
        self._chat = ChatTokenizer(hf_dir, self._pads)
        self.tokenizer = self._chat.tokenizer
        self._vision = vision
        self._system_prompt = system_prompt
        self._max_tokens = max_tokens
        self._wording = wording
        self._stop = self.tokenizer.convert_tokens_to_ids(STOP)

    def prompt(self, sample: VideoSample, video: EncodedVideo) -> Prompt:
        """Raises ConfigError if the prompt exceeds data.max_prompt_tokens."""
        task = TASKS[sample.task]
        released = task.temporal_r1_question if self._wording == "temporal_r1" else None
        question = released or task.question
        return self.encode(
            sample.id, SYSTEM_PROMPTS[self._system_prompt], (video,), question(sample)
        )

    def encode(
        self, name: str, system: str | None, visuals: tuple[Visual, ...], question: str
    ) -> Prompt:
        """Visuals first, in their order, then the question; `system` None: the template's own.

        Raises ConfigError if the prompt exceeds data.max_prompt_tokens, and DataError if a text
        has no encoding; both name the sample.
        """
        vision = self._vision
        check_text(name, system or "", question)
        compact = self._render(system, visuals, question)
        blocks = [VisionBlock.of(visual) for visual in visuals]
        cells = [block.num_tokens(vision.merge) for block in blocks]
        repeats = iter(cells)
        token_ids = np.repeat(compact, [next(repeats) if t in self._pads else 1 for t in compact])
        if len(token_ids) > self._max_tokens:
            raise ConfigError(
                f"The prompt of sample {name} has {len(token_ids)} tokens, {sum(cells)} of them "
                f"video, over data.max_prompt_tokens={self._max_tokens}: raise it, or lower "
                "video.total_pixels."
            )
        return Prompt(
            id=name,
            visuals=visuals,
            token_ids=token_ids,
            engine_token_ids=tuple(compact),
            positions=mrope_positions(
                token_ids,
                self._pads,
                blocks,
                merge=vision.merge,
                tokens_per_second=vision.tokens_per_second,
            ),
        )

    def target(self, sample: VideoSample) -> NDArray[np.int64]:
        """Tokens [R] of the ideal answer, stop token included: what the warm-up imitates.

        Raises DataError, naming the sample, if its text has no encoding.
        """
        if self._system_prompt == "answer":
            sample = replace(sample, rationale="")
        text = TASKS[sample.task].target(sample)
        check_text(sample.id, text)
        return self.answer(text)

    def answer(self, text: str) -> NDArray[np.int64]:
        """Tokens [R] of an answer, stop token included; no other token is special."""
        return np.array([*self._chat.text_ids(text), self._stop], dtype=np.int64)

    def _render(self, system: str | None, visuals: tuple[Visual, ...], question: str) -> list[int]:
        """Token ids with one single pad per visual."""
        kinds = ["video" if isinstance(visual, EncodedVideo) else "image" for visual in visuals]
        content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question}]
        messages: list[Message] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = self._chat.turn_ids(messages)
        pads = dict(zip(("video", "image"), self._pads, strict=True))
        if [token for token in ids if token in self._pads] != [pads[kind] for kind in kinds]:
            raise CheckpointError(
                f"{self._chat.directory}: its chat template does not show {', '.join(kinds)} as "
                "one pad token each, in their order; take the published one."
            )
        return ids


def check_text(name: str, *texts: str) -> None:
    """Raises DataError, naming the sample, if a text holds half a character."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"The text of sample {name} holds {text[error.start]!r}, half of a surrogate pair "
                "and no character: correct the annotation."
            ) from None
