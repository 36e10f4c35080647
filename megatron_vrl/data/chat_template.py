"""Messages -> token ids by a checkpoint's chat template; text of users never becomes structure.

The template is the one that transformers' AutoProcessor and vLLM take: of `processor_config.json`,
`chat_template.json` (transformers 4) or `chat_template.jinja` (transformers 5), else the
tokenizer's. A special token (`<|im_end|>`, `<|video_pad|>`) that is spelled in a caption, a
question or an answer is encoded as its letters. Without such a spelling the ids are those of the
rendered text. Left out: added tokens that are not special (`<tool_call>`): they end nothing and
show nothing, an answer may hold them, and decoding keeps them, so they are words like others.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from megatron_vrl.errors import CheckpointError
from megatron_vrl.types import STRUCTURE_TOKENS

Message = dict[str, Any]

STOP = "<|im_end|>"
PRIVATE_USE = range(0x100000, 0x10FFFE)  # code points that Unicode gives no meaning
# All that a template, which is a program, may raise over a message that it was not made for.
_NOT_RENDERED = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTokenizer:
    """Tokenizer and chat template of one checkpoint."""

    def __init__(self, hf_dir: str | Path, pads: Sequence[int]) -> None:
        """`pads`: the tokens that stand for a video and an image.

        Raises CheckpointError if the tokenizer or the template does not load, or if the template
        does not show a video.
        """
        self.directory = hf_dir
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{hf_dir} has no tokenizer that loads: {reason}") from None
        self._special = self._special_ids(pads)
        self._template = read_template(hf_dir, self.tokenizer)
        self._check_template(pads[0])

    def text_ids(self, text: str) -> list[int]:
        """Token ids of text, none of them special."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return ids

    def turn_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages and of the header of an answer; one pad for each visual.

        Raises CheckpointError if the template does not render them.
        """
        masked = _Masked(self, messages, self._template)
        rendered = self._render(masked.messages)
        ids: list[int] = []
        start = 0
        for token, begin, end in self.special_tokens(rendered):  # of the template alone
            ids += [*self.text_ids(masked.restored(rendered[start:begin])), token]
            start = end
        return ids + self.text_ids(masked.restored(rendered[start:]))

    def special_tokens(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, begin, end) of each special token that is spelled in a text."""
        found = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
        )
        for token, (begin, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if token in self._special:
                yield token, begin, end

    def _special_ids(self, pads: Sequence[int]) -> set[int]:
        """Ids of all special tokens; those of the turns and of vision are marked as such where the
        files do not say so."""
        tokenizer = self.tokenizer
        words = {*STRUCTURE_TOKENS, *tokenizer.convert_ids_to_tokens(list(pads))}
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        marked = [AddedToken(w, special=True, normalized=False) for w in sorted(words & known)]
        tokenizer.add_tokens(marked, special_tokens=True)
        added = tokenizer.added_tokens_decoder.items()
        return set(tokenizer.all_special_ids) | {id for id, token in added if token.special}

    def _render(self, messages: Sequence[Message]) -> str:
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
        content = [{"type": "video"}, {"type": "text", "text": "?"}]
        shown = self.turn_ids([{"role": "user", "content": content}]).count(video_pad)
        if shown != 1:
            raise CheckpointError(
                f"{self.directory}: its chat template renders {shown} vision tokens for a message "
                f"with one video (video_token_id={video_pad}); {_USE_THE_RELEASED}"
            )


_USE_THE_RELEASED = "take chat_template.json (or chat_template.jinja) of the published checkpoint."


def read_template(hf_dir: str | Path, tokenizer: Any) -> str:
    """The template that AutoProcessor takes, else the tokenizer's, as vLLM does.

    Raises CheckpointError if there is none, or several and none is called default.
    """
    try:
        processor, _ = ProcessorMixin.get_processor_dict(hf_dir)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{hf_dir}: its chat template cannot be read ({reason:.200}); {_USE_THE_RELEASED}"
        ) from None
    found = processor.get("chat_template")
    found = tokenizer.chat_template if found is None else found
    if isinstance(found, dict):
        names = ", ".join(map(str, found))
        if "default" not in found:
            raise CheckpointError(
                f"{hf_dir} has the chat templates {names} and none called default; "
                f"{_USE_THE_RELEASED}"
            )
        found = found["default"]
    if not isinstance(found, str):
        raise CheckpointError(f"{hf_dir} has no chat template; {_USE_THE_RELEASED}")
    return found


class _Masked:
    """Messages in which no special token is spelled, and the way back.

    The first character of each one in a text is replaced by a character for private use that
    neither the messages nor the template hold.
    """

    def __init__(self, chat: ChatTokenizer, messages: Sequence[Message], template: str) -> None:
        everything = template + "".join(_texts(messages))
        self._unused = (chr(code) for code in PRIVATE_USE if chr(code) not in everything)
        self._mask: dict[str, str] = {}  # character -> what stands for it
        self._chat = chat
        self.messages = [
            message | {"content": self._masked_content(message["content"])} for message in messages
        ]

    def restored(self, text: str) -> str:
        for character, mask in self._mask.items():
            text = text.replace(mask, character)
        return text

    def _masked_content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._masked_text(content)
        return [
            part | {"text": self._masked_text(part["text"])} if "text" in part else part
            for part in content
        ]

    def _masked_text(self, text: str) -> str:
        while places := [begin for _, begin, _ in self._chat.special_tokens(text)]:
            for place in places:
                character = text[place]
                if character not in self._mask:
                    self._mask[character] = next(self._unused)
                text = text[:place] + self._mask[character] + text[place + 1 :]
        return text


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if "text" in part)
