"""The content of a run directory decides which run may continue in it."""

from pathlib import Path

import pytest
import yaml

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import ConfigError
from megatron_vrl.trainer.run_dir import PROGRESS, check_run_dir, check_writable


def configured(out_dir: Path, seed: int = 1, **grpo: int) -> RunConfig:
    run = {"out_dir": str(out_dir), "seed": seed}
    return RunConfig.model_validate({"run": run, "model": {"checkpoint": "c"}, "grpo": grpo})


def written(cfg: RunConfig, *paths: str) -> None:
    for path in ("config.yaml", *paths):
        place = Path(cfg.run.out_dir) / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))


def test_an_empty_directory_takes_any_run(tmp_path: Path) -> None:
    for trains in (True, False):
        check_run_dir(configured(tmp_path), trains)


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    written(configured(tmp_path, steps=3), "checkpoints/latest")
    check_run_dir(configured(tmp_path, steps=3), trains=True)
    with pytest.raises(ConfigError, match=r"a run with grpo.steps=3, not 4: choose another"):
        check_run_dir(configured(tmp_path, steps=4), trains=True)
    with pytest.raises(ConfigError, match="holds a run that trains: choose another"):
        check_run_dir(configured(tmp_path, steps=3), trains=False)


def test_rollouts_without_training_may_become_more_and_are_not_overwritten(tmp_path: Path) -> None:
    written(configured(tmp_path, steps=3), PROGRESS)
    check_run_dir(configured(tmp_path, steps=4), trains=False)
    with pytest.raises(ConfigError, match="holds rollouts that were made without training"):
        check_run_dir(configured(tmp_path, steps=3), trains=True)
    with pytest.raises(ConfigError, match=r"a run with run.seed=1, not 5"):
        check_run_dir(configured(tmp_path, seed=5, steps=3), trains=False)


def test_a_directory_that_cannot_be_written_is_named_and_a_trial_leaves_nothing(
    tmp_path: Path,
) -> None:
    check_writable(str(tmp_path / "a" / "b"), keep=False)
    assert not list(tmp_path.iterdir())
    check_writable(str(tmp_path / "a" / "b"), keep=True)
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    for wrong in (
        tmp_path / "file",
        tmp_path / "file" / "x",
        tmp_path / "dangling",
        "/proc/x",
        "/sys",
    ):
        with pytest.raises(ConfigError, match=rf"run\.out_dir={wrong} cannot be written \(.+\): "):
            check_writable(str(wrong), keep=False)
