"""Mistakes in a config: one sentence with the key, the value and what to write instead."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Rewards, RunConfig, check_batches, check_dev, load_config
from megatron_vrl.config.foreign_keys import FOREIGN
from megatron_vrl.errors import ConfigError
from megatron_vrl.rewards.weights import reward_weights
from tests.running import CONFIG, ROOT


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("grpo.stpes=3", "Command line: unknown key 'grpo.stpes'; did you mean 'grpo.steps'?"),
        ("gpro.steps=3", "unknown key 'gpro'; did you mean 'grpo'?"),
        ("grpo.steps=three", "Command line: grpo.steps must be a whole number, not 'three'."),
        ("rollout.group_size=0", "Command line: rollout.group_size must be more than 0, not 0."),
        ("model.freeze_vision=7", "model.freeze_vision must be true or false, not 7."),
        ("grpo.optimizer.lr=x", "Command line: grpo.optimizer.lr must be a number, not 'x'."),
        ("video.decoder=pyva", "must be 'dali' or 'pyav', not 'pyva'; did you mean 'pyav'?"),
        ("algorithm.adv_estimator=grpo", "the key here is 'algorithm.name'."),
        ("actor_rollout_ref.rollout.n=4", "the key here is 'rollout.group_size'."),
        ("grpo.num_generations=4", "the key here is 'rollout.group_size'."),
        ("num_generations=4", "Write rollout.group_size=4."),
        ("data.train=nope.yaml", "nope.yaml cannot be read (No such file or directory)."),
        ("grpo", "Override 'grpo' is not of the form section.key=value."),
        ("grpo.steps=[", "Override 'grpo.steps=[': the value is not YAML."),
        ("model.checkpoint.x=1", "model.checkpoint is not a section."),
    ],
)
def test_config_mistakes(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, [override])
    assert sentence in str(error.value)


def test_config_file_that_is_missing_or_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the config .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="holds a list, not sections"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"c\.yaml is empty\. See"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("run:\n\tout_dir: x\n")
    with pytest.raises(ConfigError, match="line 2 is indented with a tab; use spaces"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(CONFIG.read_text().replace("grpo:", "grpo:\n  stpes: 1", 1))
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown key 'grpo\.stpes'"):
        load_config(tmp_path / "c.yaml", ["grpo.steps=3"])


def test_every_verl_or_trl_key_maps_to_an_existing_key() -> None:
    for ours in FOREIGN.values():
        section: Any = RunConfig
        for name in ours.split(".")[:-1]:
            section = section.model_fields[name].annotation
        assert ours.split(".")[-1] in section.model_fields


def test_fewer_prompts_than_replicas_are_refused() -> None:
    cfg = load_config(ROOT / "configs/quickstart.yaml", ["rollout.prompts_per_step=3"])
    check_batches(cfg, 3)
    with pytest.raises(ConfigError, match="prompts_per_step=3 is less than the 4 model replicas"):
        check_batches(cfg, 4)


@pytest.mark.parametrize("key", ["sft.stop_metric", "grpo.evaluate_every"])
def test_evaluation_of_a_missing_dev_split_is_refused(key: str) -> None:
    without = ["data.evaluation.dev=[]", "sft.stop_metric=''", "grpo.evaluate_every=0"]
    values = {"sft.stop_metric": "temporal_grounding/miou", "grpo.evaluate_every": 30}
    config = ROOT / "configs/quickstart.yaml"
    check_dev(load_config(config, [*without, "grpo.steps=29", "grpo.evaluate_every=30"]))
    cfg = load_config(config, [*without, f"{key}={values[key]}"])
    with pytest.raises(ConfigError, match=rf"{key} needs the split data\.evaluation\.dev: list"):
        check_dev(cfg)


def test_best_weights_without_a_metric_are_refused() -> None:
    best = ["sft.load_best_at_end=true", "sft.stop_at=null"]
    check_dev(load_config(ROOT / "configs/quickstart.yaml", best))
    cfg = load_config(ROOT / "configs/quickstart.yaml", [*best, "sft.stop_metric=''"])
    with pytest.raises(ConfigError, match=r"load_best_at_end .*: set sft\.stop_metric="):
        check_dev(cfg)


def test_a_weight_of_an_unknown_component_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"acuracy.*accuracy"):
        reward_weights(Rewards(weights={"multiple_choice": {"acuracy": 0.5}}))
