"""Reading of YAML, overrides and validation of configurations; each error is one sentence."""

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
    """Return the sections of a YAML file. Raise ConfigError."""
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
    """Return the sources of a Temporal-R1 YAML file. Raise ValueError, as pydantic validators
    do."""
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
    """Return `tree` with `section.key=value` overrides applied in place, validated as `schema`.

    Raise ConfigError. Its message names `origin`, or "Command line" if an override caused it.
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
    """Return `tree` validated as `schema`. Raise ConfigError with key, value and nearest known
    name.

    `if_missing` says what to do about a missing `{key}`. An error under one of `overridden_keys` is
    attributed to the command line.
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
    """Return the YAML error and its line, without the quoted text of the line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    line = error.problem_mark.line + 1
    if error.problem and r"'\t'" in error.problem:
        return f"line {line} is indented with a tab; use spaces"
    return f"line {line}, column {error.problem_mark.column + 1}: {error.problem}"


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set the key of one override in `tree`. Raise ConfigError if the override is malformed."""
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
