"""ChatTokenizer: messages -> token ids by a checkpoint's chat template.

The template is the one that transformers' AutoProcessor and vLLM use: from `processor_config.json`,
`chat_template.json` (transformers 4) or `chat_template.jinja` (transformers 5), else the
tokenizer's.

User text never becomes a special token: if a caption, question or answer contains the characters of
one (`<|im_end|>`, `<|video_pad|>`), they are encoded as plain text. Text without them has the ids
that transformers gives. Added tokens that are not special (`<tool_call>`) are treated as plain
words: they neither end a turn nor stand for a visual.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from megatron_vrl.errors import CheckpointError

Message = dict[str, Any]

PRIVATE_USE = range(0x100000, 0x10FFFE)  # Unicode private use code points
# Exceptions that a template, which is a program, may raise for a message it does not support.
_NOT_RENDERED = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTokenizer:
    """Tokenizer and chat template of one checkpoint."""

    def __init__(
        self, hf_dir: str | Path, pads: Sequence[int], structure_tokens: Sequence[str]
    ) -> None:
        """`pads`: ids of the video and image pad tokens. `structure_tokens`: turn and vision tokens
        of the family, which are special even if the tokenizer files do not mark them so.

        Raises CheckpointError if tokenizer or template cannot be loaded, or if the template does
        not render a video.
        """
        self.directory = hf_dir
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{hf_dir} has no tokenizer that loads: {reason}") from None
        self._special = self._special_ids(pads, structure_tokens)
        self._template = read_template(hf_dir, self.tokenizer)
        self._check_template(pads[0])

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of plain text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return ids

    def turn_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of the messages and the answer's header.

        Each visual is one pad token. Raises CheckpointError if the template does not render the
        messages.
        """
        masked = _Masked(self, messages, self._template)
        rendered = self._render(masked.messages)
        ids: list[int] = []
        start = 0
        for token, begin, end in self.special_tokens(rendered):  # only the template's own
            ids += [*self.text_ids(masked.restored(rendered[start:begin])), token]
            start = end
        return ids + self.text_ids(masked.restored(rendered[start:]))

    def special_tokens(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield (id, begin, end) of each special token in a text."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
        )
        for token, (begin, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if token in self._special:
                yield token, begin, end

    def _special_ids(self, pads: Sequence[int], structure_tokens: Sequence[str]) -> set[int]:
        """Return the ids of all special tokens; mark `structure_tokens` as special first."""
        tokenizer = self.tokenizer
        special = {*structure_tokens, *tokenizer.convert_ids_to_tokens(list(pads))}
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        marked = [AddedToken(w, special=True, normalized=False) for w in sorted(special & known)]
        tokenizer.add_tokens(marked, special_tokens=True)
        added = tokenizer.added_tokens_decoder.items()
        return set(tokenizer.all_special_ids) | {id for id, token in added if token.special}

    def _render(self, messages: Sequence[Message]) -> str:
        """Return the rendered text. Raises CheckpointError."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except _NOT_RENDERED as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.directory}: its chat template does not render a message with a video "
                f"({reason:.200}); {_USE_THE_RELEASED}"
            ) from None
        return text

    def _check_template(self, video_pad: int) -> None:
        """Raise CheckpointError if the template does not render one video as one pad token."""
        content = [{"type": "video"}, {"type": "text", "text": "?"}]
        shown = self.turn_ids([{"role": "user", "content": content}]).count(video_pad)
        if shown != 1:
            raise CheckpointError(
                f"{self.directory}: its chat template renders {shown} vision tokens for a message "
                f"with one video (video_token_id={video_pad}); {_USE_THE_RELEASED}"
            )


_USE_THE_RELEASED = "take chat_template.json (or chat_template.jinja) of the released checkpoint."


def read_template(hf_dir: str | Path, tokenizer: Any) -> str:
    """Return the template of AutoProcessor, else the tokenizer's, as vLLM does.

    Raises CheckpointError if there is no template, or several without one named default.
    """
    try:
        processor, _ = ProcessorMixin.get_processor_dict(hf_dir)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{hf_dir}: its chat template cannot be read ({reason:.200}); {_USE_THE_RELEASED}"
        ) from None
    template = processor.get("chat_template")
    template = tokenizer.chat_template if template is None else template
    if isinstance(template, dict):
        names = ", ".join(map(str, template))
        if "default" not in template:
            raise CheckpointError(
                f"{hf_dir} has the chat templates {names} and none called default; "
                f"{_USE_THE_RELEASED}"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise CheckpointError(f"{hf_dir} has no chat template; {_USE_THE_RELEASED}")
    return template


class _Masked:
    """Messages whose texts contain no special token, because every one is masked.

    In each special token inside a text, the first character is replaced by a private use character
    that occurs neither in the messages nor in the template. `restored` undoes it. Example: "a
    <|im_end|>" becomes "a X|im_end|>", where X is the character U+100000. So every special token in
    the rendered text is the template's own.
    """

    def __init__(self, chat: ChatTokenizer, messages: Sequence[Message], template: str) -> None:
        everything = template + "".join(_texts(messages))
        self._unused = (chr(code) for code in PRIVATE_USE if chr(code) not in everything)
        self._mask: dict[str, str] = {}  # character -> its replacement
        self._chat = chat
        self.messages = [
            message | {"content": self._masked_content(message["content"])} for message in messages
        ]

    def restored(self, text: str) -> str:
        """Return the text with the original characters."""
        for character, mask in self._mask.items():
            text = text.replace(mask, character)
        return text

    def _masked_content(self, content: Any) -> Any:
        """Return the content of a message with masked texts."""
        if isinstance(content, str):
            return self._masked_text(content)
        return [
            part | {"text": self._masked_text(part["text"])} if "text" in part else part
            for part in content
        ]

    def _masked_text(self, text: str) -> str:
        """Return the text with every special token masked."""
        while positions := [begin for _, begin, _ in self._chat.special_tokens(text)]:
            for position in positions:
                character = text[position]
                if character not in self._mask:
                    self._mask[character] = next(self._unused)
                text = text[:position] + self._mask[character] + text[position + 1 :]
        return text


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """Yield the texts of messages."""
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if "text" in part)
