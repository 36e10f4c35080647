"""Checks of a run directory: whether this run may resume in it, and whether it is writable."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import yaml

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import ConfigError

PROGRESS = "rollouts/progress.json"  # written by `mvrl train --rollouts-only`


def check_run_dir(cfg: RunConfig, trains: bool) -> None:
    """Raises ConfigError if run.out_dir holds a run with another configuration.

    `trains` is False for --rollouts-only. Such a run may resume with more steps (grpo.steps). Any
    run may resume with other layout, engine size, checkpoint and logging settings.
    """
    out_dir = Path(cfg.run.out_dir)
    if trains and (out_dir / PROGRESS).exists():
        raise ConfigError(
            f"{out_dir} holds rollouts that were made without training: choose another run.out_dir."
        )
    if not trains and (out_dir / "checkpoints").exists():
        raise ConfigError(f"{out_dir} holds a run that trains: choose another run.out_dir.")
    if (out_dir / "config.yaml").exists():
        sections = ("run", "model", "data", "rewards", "algorithm")
        _check_same_values(cfg, out_dir, (*sections, "sft", "grpo") if trains else sections)


def check_writable(out_dir: str, keep: bool) -> None:
    """Raises ConfigError unless run.out_dir can be created and written.

    The check creates missing folders. It removes them again unless `keep` is True.
    """
    folder = Path(out_dir)
    created = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"test")
    except OSError as error:
        raise ConfigError(
            f"run.out_dir={out_dir} cannot be written ({error.strerror}): choose another folder."
        ) from None
    finally:
        for parent in () if keep else created:
            with suppress(OSError):  # it was not created, or another process uses it
                parent.rmdir()


def _check_same_values(cfg: RunConfig, out_dir: Path, sections: tuple[str, ...]) -> None:
    """Raises ConfigError naming the first key of `sections` that differs from OUT/config.yaml."""
    stored = yaml.safe_load((out_dir / "config.yaml").read_text())
    current = cfg.model_dump(mode="json")
    for section in sections:
        for key, value in current[section].items():
            if f"{section}.{key}" == "run.lock_timeout_s":
                continue
            if stored[section].get(key) != value:
                raise ConfigError(
                    f"{out_dir} holds a run with {section}.{key}="
                    f"{stored[section].get(key)!r}, not {value!r}: choose another run.out_dir, "
                    "or remove it to start over."
                )
