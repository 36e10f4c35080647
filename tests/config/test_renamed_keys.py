"""Old keys and values are refused with their new names, and the new names exist."""

import pytest

from megatron_vrl.config import load_config
from megatron_vrl.config.renamed_keys import RENAMED, RENAMED_VALUES
from megatron_vrl.errors import ConfigError
from tests.running import CONFIG


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"'{old}' is now called '{new}'"):
        load_config(CONFIG, [f"{old}=1"])
    section, name, *_ = new.split(".")
    assert name in type(getattr(load_config(CONFIG), section)).model_fields


def test_a_nested_old_key_is_told_its_whole_new_name() -> None:
    old, new = "rewards.multiple_choice.format", "rewards.weights.multiple_choice.format"
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, [f"{old}=1"])
    assert str(error.value) == f"Command line: {old!r} is now called {new!r}."
    assert load_config(CONFIG, [f"{new}=1"]).rewards.weights == {"multiple_choice": {"format": 1}}


@pytest.mark.parametrize(("old", "new"), RENAMED_VALUES.items())
def test_an_old_value_is_refused_with_its_new_name(old: tuple[str, str], new: str) -> None:
    key, value = old
    with pytest.raises(ConfigError, match=f"{key}='{value}' is now written '{new}'"):
        load_config(CONFIG, [f"{key}={value}"])
    section, name = key.split(".")
    overrides = [f"{key}={new}"]
    assert getattr(getattr(load_config(CONFIG, overrides), section), name) == new
