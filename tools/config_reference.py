#!/usr/bin/env python3
"""Print docs/config.md: type, default and help of every key of megatron_vrl.config.RunConfig.

config_reference.py > docs/config.md
"""

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_vrl.config import Lora, Optimizer, RunConfig, Source
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

HEAD = """# Configuration

Made by `python tools/config_reference.py > docs/config.md`; a test compares the two.

A run is one YAML file of sections, each with its keys. Defaults < file < command line
(`section.key=value`, the value in YAML). Unknown keys, wrong types and values out of range are
refused with one sentence. `--dry-run` prints the resolved whole and checks layout and files.
"""


def main() -> None:
    tool_parser(__doc__).parse_args()
    print(reference(), end="")


def reference() -> str:
    sections = {name: _section(field) for name, field in RunConfig.model_fields.items()}
    tables = [_table(f"`{name}`", section) for name, section in sections.items()]
    tables.append(_table("A source, in the lists of `data`", Source))
    tables.append(_table("`model.lora`", Lora))
    tables.append(_table("An optimizer, in `sft` and `grpo`", Optimizer))
    return "\n".join([HEAD, *tables])


def _table(title: str, section: type[BaseModel]) -> str:
    rows = [_row(name, field) for name, field in section.model_fields.items()]
    return "\n".join(
        [f"## {title}\n", "| key | type | default | meaning |", "|-|-|-|-|", *rows, ""]
    )


def _row(name: str, field: FieldInfo) -> str:
    description = " ".join((field.description or "").split())
    cells = (f"`{name}`", _type_text(field), _default_text(field.default), description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_text(field: FieldInfo) -> str:
    limits = [_limit_words(limit) for limit in field.metadata]
    return " ".join([_plain(field.annotation), *limits])


def _plain(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (types.UnionType, Union):
        return " or ".join(_plain(each) for each in get_args(annotation))
    if annotation is type(None):
        return "null"
    if annotation is ...:
        return "..."
    if isinstance(annotation, types.GenericAlias):
        inner = ", ".join(_plain(argument) for argument in get_args(annotation))
        return f"{annotation.__origin__.__name__}[{inner}]"
    return str(annotation.__name__)


def _limit_words(limit: Any) -> str:
    signs = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
    kind = type(limit).__name__
    return f"{signs[kind]} {getattr(limit, kind.lower())}"


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        default = default.model_dump(exclude_unset=True)
    return f"`{default if default and isinstance(default, str) else json.dumps(default)}`"


def _section(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return field.annotation


if __name__ == "__main__":
    run_program(main)
