"""Records against the form of their file: one sentence for what does not fit.

A file that is of another published form is told so, by trying the readers on its first records.
"""

import reprlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.data.formats.json_files import begins_a_list, is_lines, load, records
from megatron_vrl.data.formats.records import Reader
from megatron_vrl.errors import DataError

HEAD = 20  # records of a file that the readers are tried on
FORMS_PAGE = "docs/tasks.md"
_SHAPES = {"list_type": "a list", "dict_type": "an object"}
_JSON_NAMES = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 78, 78


class Misshapen(DataError):
    """A file that holds no list where its form has one, or no object."""

    def __init__(self, source: Source, wanted: str, seen: Any) -> None:
        """`wanted` is "a list" or "an object", `seen` what the file holds."""
        holds = _JSON_NAMES.get(type(seen), "a number")
        super().__init__(
            f"{source.json_path} does not look like {source.format} ({wanted}): it holds {holds}. "
            f"{FORMS_PAGE} has the forms."
        )
        self.wanted = wanted


class OtherForm(DataError):
    """A file that is of other published forms than its source says."""

    def __init__(self, source: Source, reason: str, others: Sequence[str]) -> None:
        super().__init__(
            f"{source.json_path} does not look like {source.format} ({reason}); it looks like "
            f"{' or '.join(others)}."
        )


def shown(value: Any) -> str:
    """Return at most 80 characters of a value, however large or deep it is."""
    return "null" if value is None else f"{_REPR.repr(value):.80}"


def validated(form: TypeAdapter[Any], content: Any, source: Source, place: str = "") -> Any:
    """Return the records of `content` as `form` makes them.

    `place` names the record in messages where `content` holds one alone, such as "line 3".
    Raises DataError naming file, record, field, the value seen and what is expected.
    """
    try:
        return form.validate_python(content)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    where, sentence = source.json_path, _sentence(wrong, place)
    if not sentence:
        raise Misshapen(source, _SHAPES[wrong["type"]], wrong["input"])
    joint = ", " if sentence.startswith("line ") else ": "
    raise DataError(f"{where}{joint}{sentence}.")


def looks_like(source: Source, readers: Mapping[str, Reader]) -> list[str]:
    """Return the forms whose readers make samples of the first records of the source's file.

    Raises DataError if the file cannot be read.
    """
    name, content = _head(source.json_path)
    return [
        form
        for form, reader in readers.items()
        if form != source.format
        and _reads(reader, {name: content} if reader.by_file else content, source, form)
    ]


def _sentence(wrong: Mapping[str, Any], place: str) -> str:
    """Return what is wrong with a record; "" if it is the shape of the whole file."""
    if wrong["type"] in _SHAPES and len(wrong["loc"]) <= (0 if place else 1):
        return ""
    record, *field = wrong["loc"] or ("",)
    where = place or f"record {shown(record)}"
    if not field:
        return f"{where} is {shown(wrong['input'])}, expected an object"
    name = ".".join(map(str, field))
    if wrong["type"] == "missing":
        return f"{where}: field {shown(name)} is missing"
    return f"{where}: field {shown(name)} is {shown(wrong['input'])}, refused: {wrong['msg']}"


def _head(path: str) -> tuple[str, Any]:
    """(name without ending, first records) of a file, or of the first file of a folder."""
    if Path(path).is_dir():
        path = str(min(Path(path).glob("*.json")))
    name = Path(path).stem
    if path.endswith(".csv"):
        return name, None
    if is_lines(path) or begins_a_list(path):
        return name, [found.record for found in islice(records(path), HEAD)]
    content = load(path)
    return name, dict(islice(content.items(), HEAD)) if isinstance(content, dict) else content


def _reads(reader: Reader, content: Any, source: Source, form: str) -> bool:
    asked = source.model_copy(update={"format": form})
    try:
        checked = reader.form.validate_python(content)
        keyed = checked.items() if isinstance(checked, dict) else enumerate(checked)
        return bool(list(reader.samples(keyed, asked, lambda path: 1.0)))
    except (ValidationError, DataError):
        return False
