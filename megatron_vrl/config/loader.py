"""A configuration of sections from a tree of values and overrides, or one sentence why not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_vrl.config.foreign_keys import name_here
from megatron_vrl.config.messages import key_of, reason
from megatron_vrl.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)


def read_tree(path: str | Path) -> dict[str, Any]:
    """Sections of a YAML file. Raises ConfigError."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"Cannot read the config {path}: {error.strerror}. Give --config FILE."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_mistake(error)}.") from None
    if tree is None:
        raise ConfigError(f"{path} is empty. See configs/quickstart.yaml.")
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"the value {tree!r:.40}"
        raise ConfigError(f"{path} holds {kind}, not sections. See configs/quickstart.yaml.")
    return tree


def read_mix(path: str) -> list[Any]:
    """Sources of a YAML file as Temporal-R1 has them. Raises ValueError, for a pydantic model."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {_yaml_mistake(error)}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("datasets"), list):
        raise ValueError(f"{path} has no list `datasets` of sources")
    return list(tree["datasets"])


def overridden(
    schema: type[Schema], tree: dict[str, Any], overrides: Sequence[str], origin: str
) -> Schema:
    """`tree`, changed in place by `section.key=value` overrides, as a `schema` of sections.

    Raises ConfigError; `origin` says in it where the tree came from, or "Command line" if the
    mistake is one of the overrides.
    """
    for override in overrides:
        _apply(tree, override)
    keys = [override.partition("=")[0] for override in overrides]
    return checked(schema, tree, origin, "set it in the file or as {key}=VALUE.", keys)


def checked(
    schema: type[Schema],
    tree: dict[str, Any],
    origin: str,
    if_missing: str,
    overridden_keys: Sequence[str] = (),
) -> Schema:
    """Raises ConfigError naming the key, the value and the nearest known name.

    `if_missing` says what to do about an absent `{key}`. A mistake under one of `overridden_keys`
    is one of the command line.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        where = key_of(error)
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        for key in overridden_keys:
            if f"{where}.".startswith(f"{key}.") or (unknown and key.startswith(f"{where}.")):
                origin = "Command line"
        raise ConfigError(f"{origin}: {reason(error, schema, if_missing)}") from None


def _yaml_mistake(error: yaml.YAMLError) -> str:
    """Return what is wrong and in which line, without the quoted line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    line = error.problem_mark.line + 1
    if error.problem and r"'\t'" in error.problem:
        return f"line {line} is indented with a tab; use spaces"
    return f"line {line}, column {error.problem_mark.column + 1}: {error.problem}"


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not sections or not all(key.split(".")):
        ours = name_here(key) if equals else ""
        hint = f" Write {ours}={text}." if ours else ""
        raise ConfigError(f"Override {override!r} is not of the form section.key=value.{hint}")
    node = tree
    for depth, name in enumerate(sections):
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"Override {override!r}: {'.'.join(sections[: depth + 1])} is not a section."
            )
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"Override {override!r}: the value is not YAML. Quote it.") from None
