"""Read configurations from YAML, apply overrides and validate them. Each error is one sentence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_vrl.config.foreign_keys import equivalent_key
from megatron_vrl.config.messages import error_message, key_of_first_error
from megatron_vrl.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)


def read_tree(path: str | Path) -> dict[str, Any]:
    """Return the sections of a YAML file. Raise ConfigError if it cannot be read or has none."""
    try:
        tree = _parsed(path)
    except OSError as error:
        raise ConfigError(
            f"Cannot read the config {path}: {error.strerror}. Give --config FILE."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_error(error)}.") from None
    if tree is None:
        raise ConfigError(f"{path} is empty. See configs/quickstart.yaml.")
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"the value {tree!r:.40}"
        raise ConfigError(f"{path} holds {kind}, not sections. See configs/quickstart.yaml.")
    return tree


def _parsed(path: str | Path) -> Any:
    """Return the value of a YAML file. Raise OSError or YAMLError."""
    try:
        return yaml.safe_load(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # no UTF-8, a date of month 13, nested too deeply
        raise yaml.YAMLError(str(error)) from None


def read_mix(path: str) -> list[Any]:
    """Return the list `datasets` of a YAML file in Temporal-R1's format.

    Raise ValueError, since a pydantic validator calls the function.
    """
    try:
        tree = _parsed(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {_yaml_error(error)}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("datasets"), list):
        raise ValueError(f"{path} has no list `datasets` of sources")
    return list(tree["datasets"])


def validate_with_overrides(
    schema: type[Schema], tree: dict[str, Any], overrides: Sequence[str], origin: str
) -> Schema:
    """Apply `section.key=value` overrides to `tree` in place and return it validated as `schema`.

    Raise ConfigError. The message names `origin`, or "Command line" if an override caused it.
    """
    for override in overrides:
        _apply_override(tree, override)
    keys = [override.partition("=")[0] for override in overrides]
    return validate(schema, tree, origin, "set it in the file or as {key}=VALUE.", keys)


def validate(
    schema: type[Schema],
    tree: dict[str, Any],
    origin: str,
    if_missing: str,
    overridden_keys: Sequence[str] = (),
) -> Schema:
    """Return `tree` validated as `schema`.

    Raise ConfigError. The message names `origin`, the key, the value and the nearest known key.
    `if_missing` is the advice for a missing key; `{key}` in it stands for the key. The message of
    an error under one of `overridden_keys` names "Command line" in place of `origin`.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        wrong_key = key_of_first_error(error)
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        for key in overridden_keys:
            if f"{wrong_key}.".startswith(f"{key}.") or (
                unknown and key.startswith(f"{wrong_key}.")
            ):
                origin = "Command line"
        raise ConfigError(f"{origin}: {error_message(error, schema, if_missing)}") from None


def _yaml_error(error: yaml.YAMLError) -> str:
    """Return the YAML error and its line, without the quoted text of the line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    line = error.problem_mark.line + 1
    if error.problem and r"'\t'" in error.problem:
        return f"line {line} is indented with a tab; use spaces"
    return f"line {line}, column {error.problem_mark.column + 1}: {error.problem}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the key of one override in `tree`. Raise ConfigError if the override is malformed."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not sections or not all(key.split(".")):
        equivalent = equivalent_key(key) if equals else ""
        hint = f" Write {equivalent}={text}." if equivalent else ""
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
