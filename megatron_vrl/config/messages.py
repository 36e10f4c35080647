"""One-sentence messages for pydantic's validation errors."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megatron_vrl.config.foreign_keys import name_here
from megatron_vrl.config.renamed_keys import RENAMED, RENAMED_VALUES

COMPARED = {  # pydantic's error type -> (phrase, name of the limit in the error's context)
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
WANTED = {  # prefix of pydantic's error type -> what the value must be
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "list_": "a list",
}


def reason(error: ValidationError, schema: type[BaseModel], if_missing: str) -> str:
    """Return the message of the first error: key, value and nearest known name.

    `if_missing` says what to do about a missing `{key}`.
    """
    first = error.errors()[0]
    where = key_of(error)
    if first["type"] == "extra_forbidden":
        return _unknown(first["loc"], first["input"], schema)
    if first["type"] == "missing":
        return f"{where!r} is missing; {if_missing.format(key=where)}"
    if first["type"] == "value_error":
        return f"{where}={first['input']!r} is refused: {first['ctx']['error']}."
    wanted = _wanted(first["type"], first.get("ctx", {}))
    if not wanted:
        return f"{where}={first['input']!r} is refused: {first['msg']}."
    choices = re.findall(r"'(\w+)'", wanted) if first["type"] == "literal_error" else []
    near = difflib.get_close_matches(str(first["input"]), choices, n=1)
    if new := RENAMED_VALUES.get((where, str(first["input"]))):
        return f"{where}={first['input']!r} is now written {new!r}."
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{where} must be {wanted}, not {first['input']!r}{hint}"


def key_of(error: ValidationError) -> str:
    """Return the key of the first error, for example "grpo.steps"."""
    return ".".join(str(part) for part in error.errors()[0]["loc"])


def _wanted(kind: str, limits: dict[str, Any]) -> str:
    """Return the requirement that the error type `kind` violates, for example "at least 1"; "" if
    unknown."""
    if kind in COMPARED:
        word, limit = COMPARED[kind]
        return f"{word} {limits[limit]:g}"
    if kind == "literal_error":
        return str(limits["expected"])
    return next((text for prefix, text in WANTED.items() if kind.startswith(prefix)), "")


def _unknown(loc: tuple[int | str, ...], value: Any, schema: type[BaseModel]) -> str:
    """Return the message for the unknown key at `loc`."""
    where = ".".join(map(str, loc))
    if new := RENAMED.get(where):
        key = f".{next(iter(value))}" if isinstance(value, dict) and len(value) == 1 else ""
        return f"{where + key!r} is now called {new + key!r}."
    full = where
    while isinstance(value, dict) and value:  # unknown section: look at its first key
        name, value = next(iter(value.items()))
        full += f".{name}"
    if ours := name_here(full):
        return f"unknown key {full!r}; the key here is {ours!r}."
    known = _names(schema, loc[:-1])
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if not near:
        return f"unknown key {where!r}; known: {', '.join(known)}."
    return f"unknown key {where!r}; did you mean {'.'.join([*map(str, loc[:-1]), near[0]])!r}?"


def _names(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the names of the section that `loc` leads to. List indices and dict keys are
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
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
