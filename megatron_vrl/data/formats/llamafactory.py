"""Reader of LLaMA-Factory's ShareGPT lists.

  llamafactory  [{conversations [{from "human", value}, {from "gpt", value}], images, videos,
                system}], or with the tags {messages [{role "user", content}, ...]}

An entry of `dataset_info.json` in the same folder, whose `file_name` is the file, names the columns
and tags, as in LLaMA-Factory. Without one, the two forms above are told apart by their column.

A record holds one user turn and its answer. The answer is the truth (megatron_vrl/data/formats/
row_truth.py); <think>...</think> at its start becomes the thinking of the SFT target. Refused by
name: several turns, tools, the format alpaca, preference pairs (`ranking`, `kto_tag`), audio.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.data.formats.json_files import load
from megatron_vrl.data.formats.records import HeaderDuration, Reader
from megatron_vrl.data.formats.rows import (
    ROW_READERS,
    ROW_SCHEMA,
    Row,
    message_text,
    refuse_system,
    row_sample,
)
from megatron_vrl.data.formats.validation import short_repr
from megatron_vrl.errors import DataError
from megatron_vrl.types import Sample

INFO_FILE = "dataset_info.json"
UNREAD = ("tools", "audios", "chosen", "rejected", "kto_tag")  # columns that are refused


class Columns(BaseModel):
    """Names of columns; "": there is no such column."""

    model_config = ConfigDict(strict=True)

    messages: str = "conversations"
    images: str = "images"
    videos: str = "videos"
    system: str = "system"


class Tags(BaseModel):
    """Fields of a message and values of its role."""

    model_config = ConfigDict(strict=True)

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    system_tag: str = "system"


OPENAI_TAGS = Tags(
    role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant"
)


class Info(BaseModel):
    """Entry of dataset_info.json."""

    model_config = ConfigDict(strict=True)

    file_name: str = ""
    formatting: str = "alpaca"
    ranking: bool = False
    columns: dict[str, Any] = {}
    tags: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns and tags of a file."""

    columns: Columns
    tags: Tags


def llamafactory(
    records: Iterable[tuple[int, Row]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record. Raises DataError naming file, record and field."""
    listed = _listed(source)
    for index, row in records:
        layout = listed or _layout_of(row)
        where = f"{source.json_path}: record {index}"
        _refuse_unread(row, where)
        question, answer = _turns(row, layout, source, where)
        rationale, answer = _thinking(answer)
        yield row_sample(
            row,
            index,
            source,
            text=question,
            answer=answer,
            answer_at=f"{where}: its answer",
            images=row.get(layout.columns.images),
            videos=row.get(layout.columns.videos),
            must_have_places=True,
            rationale=rationale,
        )


MEDIA_READERS: dict[str, Reader] = {
    **ROW_READERS,
    "llamafactory": Reader(schema=ROW_SCHEMA, samples=llamafactory, is_list=True, has_places=True),
}


def _listed(source: Source) -> Layout | None:
    """Return the layout that dataset_info.json gives; None if it does not list the file."""
    path = Path(source.json_path)
    info_file = path.parent / INFO_FILE
    if not info_file.is_file():
        return None
    content = load(str(info_file))
    entries = content.values() if isinstance(content, dict) else ()
    for entry in entries:
        if isinstance(entry, dict) and entry.get("file_name") == path.name:
            return _layout(entry, f"{info_file}: the entry of {path.name}")
    return None


def _layout(entry: dict[str, Any], where: str) -> Layout:
    """Return the layout of an entry. Raises DataError beginning with `where`."""
    try:
        info = Info.model_validate(entry)
        columns = Columns.model_validate(info.columns)
        tags = (OPENAI_TAGS if info.formatting == "openai" else Tags()).model_copy(
            update=Tags.model_validate(info.tags).model_dump(exclude_unset=True)
        )
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field = ".".join(map(str, wrong["loc"]))
        raise DataError(
            f"{where}: field {field!r} is {short_repr(wrong['input'])}, refused: {wrong['msg']}."
        ) from None
    if info.formatting not in ("sharegpt", "openai"):
        raise DataError(
            f"{where} has the formatting {info.formatting!r}, expected 'sharegpt': write the "
            "records as conversations."
        )
    if info.ranking or any(name in info.columns for name in UNREAD[2:]):
        raise DataError(f"{where} describes preference pairs, which are not read.")
    return Layout(columns, tags)


def _layout_of(row: Row) -> Layout:
    """Return the layout of a record that dataset_info.json does not describe."""
    if "messages" in row and "conversations" not in row:
        return Layout(Columns(messages="messages"), OPENAI_TAGS)
    return Layout(Columns(), Tags())


def _refuse_unread(row: Row, where: str) -> None:
    """Raise DataError if the record has content that is not read."""
    if "instruction" in row:
        raise DataError(
            f"{where} has the format alpaca (field 'instruction'), expected conversations."
        )
    for name in UNREAD:
        if row.get(name):
            raise DataError(f"{where}: field {name!r} is not read: leave it out.")


def _turns(row: Row, layout: Layout, source: Source, where: str) -> tuple[str, str]:
    """Return question and answer. Raises DataError unless they are the only turns."""
    key, tags = layout.columns.messages, layout.tags
    messages = row.get(key)
    if not isinstance(messages, list):
        raise DataError(f"{where}: field {key!r} is {short_repr(messages)}, expected messages.")
    turns = []
    for index, message in enumerate(messages):
        there = f"{where}: field {key!r}[{index}]"
        role = message.get(tags.role_tag) if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise DataError(
                f"{there} is {short_repr(message)}, expected an object with {tags.role_tag} and "
                f"{tags.content_tag}."
            )
        turns.append((role, message_text(message.get(tags.content_tag), there)))
    if turns and turns[0][0] == tags.system_tag:
        refuse_system(turns.pop(0)[1], source, where)
    elif isinstance(system := row.get(layout.columns.system), str):
        refuse_system(system, source, where)
    roles = [role for role, _ in turns]
    if roles != [tags.user_tag, tags.assistant_tag]:
        raise DataError(
            f"{where} has the turns {short_repr(roles)}, expected {tags.user_tag} and "
            f"{tags.assistant_tag}: one answer is sampled for each prompt."
        )
    return turns[0][1], turns[1][1]


def _thinking(answer: str) -> tuple[str, str]:
    """Return (thinking, answer) of a response that may begin with <think>...</think>."""
    head, closed, rest = answer.strip().partition("</think>")
    if closed and head.startswith("<think>"):
        return head.removeprefix("<think>").strip(), rest.strip()
    return "", answer
