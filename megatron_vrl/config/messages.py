"""Messages for pydantic's validation errors, one sentence each."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megatron_vrl.config.foreign_keys import equivalent_key
from megatron_vrl.config.renamed_keys import RENAMED, RENAMED_VALUES

COMPARISONS = {  # pydantic's error type -> (phrase, name of the limit in the error's context)
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
EXPECTED_TYPES = {  # prefix of pydantic's error type -> what the value must be
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "list_": "a list",
}


def error_message(error: ValidationError, schema: type[BaseModel], if_missing: str) -> str:
    """Return the message of the first error: its key, its value and the nearest known key.

    `if_missing` is the advice for a missing key; `{key}` in it stands for the key.
    """
    first = error.errors()[0]
    key = key_of_first_error(error)
    if first["type"] == "extra_forbidden":
        return _unknown_key(first["loc"], first["input"], schema)
    if first["type"] == "missing":
        return f"{key!r} is missing; {if_missing.format(key=key)}"
    if first["type"] == "value_error":
        return f"{key}={first['input']!r} is refused: {first['ctx']['error']}."
    requirement = _requirement(first["type"], first.get("ctx", {}))
    if not requirement:
        return f"{key}={first['input']!r} is refused: {first['msg']}."
    choices = re.findall(r"'(\w+)'", requirement) if first["type"] == "literal_error" else []
    nearest = difflib.get_close_matches(str(first["input"]), choices, n=1)
    if new := RENAMED_VALUES.get((key, str(first["input"]))):
        return f"{key}={first['input']!r} is now written {new!r}."
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"{key} must be {requirement}, not {first['input']!r}{hint}"


def key_of_first_error(error: ValidationError) -> str:
    """Return the key of the first error, for example "grpo.steps"."""
    return ".".join(str(part) for part in error.errors()[0]["loc"])


def _requirement(kind: str, limits: dict[str, Any]) -> str:
    """Return what pydantic's error type `kind` requires, for example "at least 1"; "" if `kind` has
    no entry here."""
    if kind in COMPARISONS:
        word, limit = COMPARISONS[kind]
        return f"{word} {limits[limit]:g}"
    if kind == "literal_error":
        return str(limits["expected"])
    return next((text for prefix, text in EXPECTED_TYPES.items() if kind.startswith(prefix)), "")


def _unknown_key(loc: tuple[int | str, ...], value: Any, schema: type[BaseModel]) -> str:
    """Return the message for the unknown key at `loc`."""
    key = ".".join(map(str, loc))
    if new := RENAMED.get(key):
        last = f".{next(iter(value))}" if isinstance(value, dict) and len(value) == 1 else ""
        return f"{key + last!r} is now called {new + last!r}."
    full = key
    while isinstance(value, dict) and value:  # unknown section: look at its first key
        name, value = next(iter(value.items()))
        full += f".{name}"
    if equivalent := equivalent_key(full):
        return f"unknown key {full!r}; the key here is {equivalent!r}."
    known = _known_keys(schema, loc[:-1])
    nearest = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if not nearest:
        return f"unknown key {key!r}; known: {', '.join(known)}."
    return f"unknown key {key!r}; did you mean {'.'.join([*map(str, loc[:-1]), nearest[0]])!r}?"


def _known_keys(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the section at the location `loc`, whose list indices and dict keys are
    skipped."""
    section = schema
    for part in loc:
        if part in section.model_fields:
            section = _section_of(section.model_fields[str(part)].annotation) or section
    return sorted(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class inside a field's annotation; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, get_args(annotation))), None)
