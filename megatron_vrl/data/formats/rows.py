"""Readers of the rows that verl, EasyR1 and Hugging Face datasets hold.

  verl  {data_source, prompt (a list of messages, or a text), images, videos, reward_model
        {ground_truth}, extra_info}; EasyR1's {problem, answer, images, videos} with
        `prompt_key: problem` and `answer_key: answer`. Each file has its place, <image> or <video>,
        in the prompt
  hf    rows of a dataset with a prompt and an answer; files without places come before the text

`prompt_key`, `answer_key`, `image_key` and `video_key` of the source name the columns, `task` the
task. A prompt is one user message. The only system message is that of `data.system_prompt`, so a
row with its own is refused, unless the source says `ignore_system`. A row with several turns is
refused: one answer is sampled for each prompt.

An id is the row's `id`, else FILE/INDEX. `data_source` becomes a label.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import HeaderDuration, Reader
from megatron_vrl.data.formats.row_media import placed, row_images, row_videos
from megatron_vrl.data.formats.row_truth import row_truth, task_of
from megatron_vrl.data.formats.validation import short_repr
from megatron_vrl.errors import DataError
from megatron_vrl.types import Sample

ANSWER_KEYS = {"verl": "reward_model.ground_truth", "hf": "answer"}
PLACES = {"image": "<image>", "video": "<video>"}  # type of a message's part -> place in a text
Row = dict[str, Any]


def rows(
    records: Iterable[tuple[int, Row]],
    source: Source,
    header_duration_s: HeaderDuration | None,
    *,
    must_have_places: bool,
) -> Iterator[Sample]:
    """Yield one sample per row. Raises DataError naming file, row and column."""
    answer_key = source.answer_key or ANSWER_KEYS.get(source.format, "")
    for index, row in records:
        where = f"{source.json_path}: record {index}"
        prompt = column(row, source.prompt_key, where, "prompt_key")
        answer = column(row, answer_key, where, "answer_key")
        yield row_sample(
            row,
            index,
            source,
            text=user_text(prompt, source, f"{where}: field {source.prompt_key!r}"),
            answer=answer,
            answer_at=f"{where}: field {answer_key!r}",
            images=row.get(source.image_key),
            videos=row.get(source.video_key),
            must_have_places=must_have_places,
        )


def row_sample(
    row: Row,
    index: int,
    source: Source,
    *,
    text: str,
    answer: Any,
    answer_at: str,
    images: Any,
    videos: Any,
    must_have_places: bool,
    rationale: str = "",
) -> Sample:
    """Return the sample of a row, given the text of its user turn and its other columns."""
    where = f"{source.json_path}: record {index}"
    task = task_of(source)
    query, media = placed(
        text.strip(),
        row_images(images, source, f"{where}: field {source.image_key!r}"),
        row_videos(videos, source, f"{where}: field {source.video_key!r}"),
        where,
        must_have_places,
    )
    truth = row_truth(answer, task, answer_at)
    name, origin = row.get("id"), row.get("data_source")
    return Sample(
        id=str(name) if isinstance(name, str | int) and name != "" else _default_id(source, index),
        task=task.name,
        media=media,
        duration_s=truth.duration_s,
        query=query,
        rationale=rationale,
        intervals_s=truth.intervals_s,
        options=truth.options,
        option=truth.option,
        truth=truth.truth,
        labels=(f"data_source/{origin}",) if isinstance(origin, str) and origin else (),
    )


def column(row: Row, key: str, where: str, named_by: str) -> Any:
    """Return a column's value; "a.b" leads into a column of objects.

    `named_by` is the key of the source that names the column. Raises DataError if it is missing.
    """
    value: Any = row
    for part in [key] if key in row else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        raise DataError(
            f"{where} has no field {key!r}; its fields are {', '.join(row) or 'none'}: name the "
            f"right one with {named_by} of the source."
        )
    return value


def user_text(prompt: Any, source: Source, where: str) -> str:
    """Return the text of a prompt's only user turn. Raises DataError beginning with `where`."""
    if isinstance(prompt, str):
        return prompt
    turns = list(_messages(prompt, where))
    if turns and turns[0][0] == "system":
        refuse_system(turns[0][1], source, where)
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if roles != ["user"]:
        raise DataError(
            f"{where} has the turns {short_repr(roles)}, expected one user turn: one answer is "
            "sampled for each prompt."
        )
    return turns[0][1]


def refuse_system(text: str, source: Source, where: str) -> None:
    """Raise DataError for a system message, unless the source leaves these out."""
    if text.strip() and not source.ignore_system:
        raise DataError(
            f"{where} has a system message, {short_repr(text)}: write it to the prompt, or give "
            "ignore_system: true to the source, since data.system_prompt is the only one."
        )


def message_text(content: Any, where: str) -> str:
    """Return the text of a message whose content is a text or a list of parts.

    Parts of the type image and video become places. Raises DataError beginning with `where`.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where} is {short_repr(content)}, expected a text or a list of parts.")
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _messages(prompt: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield (role, text) of each message of a prompt."""
    if not isinstance(prompt, list):
        raise DataError(f"{where} is {short_repr(prompt)}, expected a text or a list of messages.")
    for index, message in enumerate(prompt):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise DataError(
                f"{where}[{index}] is {short_repr(message)}, expected an object with role and "
                "content."
            )
        yield role, message_text(message.get("content"), f"{where}[{index}].content")


def _part(part: Any, where: str) -> str:
    """Return the text of a message's part, or the place of an image or a video."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in PLACES and part.get(kind) is None:
        return PLACES[kind]
    raise DataError(
        f"{where} is {short_repr(part)}, expected a text, or an image or a video whose file is in "
        "the row's column of images or videos."
    )


def _default_id(source: Source, index: int) -> str:
    """Return the id of a row without one."""
    return f"{Path(source.json_path).stem}/{index}"


ROW_SCHEMA: TypeAdapter[Any] = TypeAdapter(list[Row])
ROW_READERS: Mapping[str, Reader] = {
    name: Reader(
        schema=ROW_SCHEMA,
        samples=partial(rows, must_have_places=name == "verl"),
        is_list=True,
        has_places=True,
    )
    for name in ("verl", "hf")
}
