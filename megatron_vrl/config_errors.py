"""What pydantic found wrong with a configuration, in one sentence."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def reason(error: ValidationError, schema: type[BaseModel], if_missing: str) -> str:
    """Its first mistake: the key, the value and the nearest known name.

    `if_missing` says what to do about an absent `{key}`.
    """
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _names(schema, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        return f"unknown key {where!r}; {hint}"
    if first["type"] == "missing":
        return f"{where!r} is missing; {if_missing.format(key=where)}"
    choices = re.findall(r"'(\w+)'", first["msg"]) if first["type"] == "literal_error" else []
    near = difflib.get_close_matches(str(first["input"]), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{where}={first['input']!r} is refused: {first['msg']}{hint}"


def _names(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the section that `loc` leads to; list indices and dict keys are passed over."""
    section = schema
    for part in loc:
        if part in section.model_fields:
            section = _section_of(section.model_fields[str(part)].annotation) or section
    return sorted(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
