"""What a run directory holds already, and whether this run may go on in it."""

from pathlib import Path

import yaml

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import ConfigError

PROGRESS = "rollouts/progress.json"  # of rollouts that are made without training


def check_run_dir(cfg: RunConfig, trains: bool) -> None:
    """Raises ConfigError if run.out_dir holds a run that learns or asks for something else.

    Layout, engine size, checkpoints and logging may change between two calls, and rollouts without
    training may go on for more steps.
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
        _check_same(cfg, out_dir, (*sections, "sft", "grpo") if trains else sections)


def _check_same(cfg: RunConfig, out_dir: Path, sections: tuple[str, ...]) -> None:
    before = yaml.safe_load((out_dir / "config.yaml").read_text())
    now = cfg.model_dump(mode="json")
    for section in sections:
        for key, value in now[section].items():
            if before[section].get(key) != value:
                raise ConfigError(
                    f"{out_dir} holds a run with {section}.{key}="
                    f"{before[section].get(key)!r}, not {value!r}: choose another run.out_dir, "
                    "or remove it to start over."
                )
