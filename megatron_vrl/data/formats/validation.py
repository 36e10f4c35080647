"""Validates records against the schema of their format. An error is one sentence.

If a file does not match its configured format, the other readers are tried on its first records,
and the error names the formats that match.
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
from megatron_vrl.data.formats.tables import is_table, table_records
from megatron_vrl.errors import DataError

HEAD = 20  # number of records on which other readers are tried
FORMATS_PAGE = "docs/tasks.md"
_SHAPES = {"list_type": "a list", "dict_type": "an object"}
_JSON_NAMES = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 78, 78


class WrongTopLevelType(DataError):
    """The file contains an object where its format has a list, or the reverse."""

    def __init__(self, source: Source, wanted: str, seen: Any) -> None:
        """`wanted` is "a list" or "an object", `seen` the content of the file."""
        holds = _JSON_NAMES.get(type(seen), "a number")
        super().__init__(
            f"{source.json_path} does not look like {source.format} ({wanted}): it holds {holds}. "
            f"{FORMATS_PAGE} describes the formats."
        )
        self.wanted = wanted


class OtherFormat(DataError):
    """The file matches other formats than the one its source names."""

    def __init__(self, source: Source, reason: str, others: Sequence[str]) -> None:
        super().__init__(
            f"{source.json_path} does not look like {source.format} ({reason}); it looks like "
            f"{' or '.join(others)}."
        )


def short_repr(value: Any) -> str:
    """Return the repr of a value, shortened to 80 characters."""
    return "null" if value is None else f"{_REPR.repr(value):.80}"


def validated(schema: TypeAdapter[Any], content: Any, source: Source, location: str = "") -> Any:
    """Return `content` parsed by `schema`.

    `location` names the record in messages, such as "line 3", if `content` is a single record.
    Raises DataError naming file, record, field, value and the expected value.
    """
    try:
        return schema.validate_python(content)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    where, sentence = source.json_path, _explain(wrong, location)
    if not sentence:
        raise WrongTopLevelType(source, _SHAPES[wrong["type"]], wrong["input"])
    joint = ", " if sentence.startswith("line ") else ": "
    raise DataError(f"{where}{joint}{sentence}.")


def matching_formats(source: Source, readers: Mapping[str, Reader]) -> list[str]:
    """Return the formats whose readers produce samples from the first records of the source's file.

    Raises DataError if the file cannot be read.
    """
    name, content = _head(source.json_path)
    return [
        name_of_format
        for name_of_format, reader in readers.items()
        if name_of_format != source.format
        and _reads(reader, {name: content} if reader.by_file else content, source, name_of_format)
    ]


def _explain(wrong: Mapping[str, Any], location: str) -> str:
    """Return what is wrong with a record; "" if the top-level type of the file is wrong."""
    if wrong["type"] in _SHAPES and len(wrong["loc"]) <= (0 if location else 1):
        return ""
    record, *field = wrong["loc"] or ("",)
    where = location or f"record {short_repr(record)}"
    if not field:
        return f"{where} is {short_repr(wrong['input'])}, expected an object"
    name = ".".join(map(str, field))
    if wrong["type"] == "missing":
        return f"{where}: field {short_repr(name)} is missing"
    value = short_repr(wrong["input"])
    return f"{where}: field {short_repr(name)} is {value}, refused: {wrong['msg']}"


def _head(path: str) -> tuple[str, Any]:
    """Return (name without ending, first records) of a file, or of a folder's first file."""
    if is_table(path):
        return Path(path).stem, [entry.record for entry in islice(table_records(path), HEAD)]
    if Path(path).is_dir():
        path = str(min(Path(path).glob("*.json")))
    name = Path(path).stem
    if path.endswith(".csv"):
        return name, None
    if is_lines(path) or begins_a_list(path):
        return name, [entry.record for entry in islice(records(path), HEAD)]
    content = load(path)
    return name, dict(islice(content.items(), HEAD)) if isinstance(content, dict) else content


def _reads(reader: Reader, content: Any, source: Source, name_of_format: str) -> bool:
    """Return whether a reader produces samples from `content`."""
    asked = source.model_copy(update={"format": name_of_format})
    try:
        checked = reader.schema.validate_python(content)
        keyed = checked.items() if isinstance(checked, dict) else enumerate(checked)
        return bool(list(reader.samples(keyed, asked, lambda path: 1.0)))
    except (ValidationError, DataError):
        return False
