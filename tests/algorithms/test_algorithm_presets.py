"""Algorithm presets: applied, overridden, recorded and documented."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from megatron_vrl.algorithms import ALGORITHMS
from megatron_vrl.config import Algorithm, load_config
from megatron_vrl.config.algorithm_presets import ALGORITHM_PRESETS
from megatron_vrl.errors import ConfigError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def test_every_name_has_an_algorithm_and_a_preset() -> None:
    names = set(get_args(Algorithm.model_fields["name"].annotation))
    assert set(ALGORITHM_PRESETS) == set(ALGORITHMS) == names


@pytest.mark.parametrize("name", ALGORITHM_PRESETS)
def test_presets_are_filled_in(name: Any) -> None:
    cfg = Algorithm(name=name)
    expected = {key: field.default for key, field in Algorithm.model_fields.items()}
    assert cfg.model_dump() == {**expected, **ALGORITHM_PRESETS[name], "name": name}
    assert Algorithm.model_validate(cfg.model_dump()) == cfg  # as a written config is read again


def test_values_from_the_papers() -> None:
    """Once more by hand, so that a slip in the table shows."""

    def keys(name: Any, *wanted: str) -> tuple[bool | float | str, ...]:
        return tuple(getattr(Algorithm(name=name), key) for key in wanted)

    assert keys("grpo", "clip", "clip_high", "kl", "kl_estimator") == (0.2, 0.2, 0.01, "k3")
    assert keys("dr_grpo", "kl", "normalisation") == (0.0, "constant_length")
    assert keys("dapo", "clip", "clip_high", "kl", "entropy") == (0.2, 0.28, 0.0, 0.0)
    assert keys("dapo", "normalisation", "drop_zero_variance_groups") == ("global_tokens", True)
    assert keys("gspo", "clip", "clip_high", "kl") == (3e-4, 4e-4, 0.0)
    assert keys("gspo", "normalisation") == ("sequence_mean",)
    assert keys("cispo", "clip", "clip_high", "kl") == (1.0, 4.0, 0.0)
    assert keys("rloo", "kl_in", "kl_estimator", "normalisation") == (
        "reward",
        "k1",
        "sequence_sum",
    )
    assert keys("reinforce_plus_plus", "kl_in", "kl_estimator") == ("reward", "k1")
    assert keys("reinforce_plus_plus_baseline", "kl_in", "kl_estimator") == ("loss", "k2")


def test_config_values_override_presets() -> None:
    file = yaml.safe_load(QUICKSTART.read_text())["algorithm"]
    assert file["kl"] == 0.0 and file["entropy"] == 1e-3
    cfg = load_config(QUICKSTART, ["algorithm.name=rloo", "algorithm.clip_high=0.3"]).algorithm
    assert (cfg.kl, cfg.entropy, cfg.clip_high) == (0.0, 1e-3, 0.3)
    assert (cfg.kl_in, cfg.normalisation) == ("reward", "sequence_sum")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algorithm.name=gropo", "algorithm.name must be 'grpo', "),
        ("algorithm.name=gropo", "; did you mean 'grpo'?"),
        ("algorithm.name=reinforce++", "did you mean 'reinforce_plus_plus'?"),
        ("algorithm.name=[grpo]", "not ['grpo']"),
        ("algorithm.name=7", "not 7"),
        ("algorithm.normalisation=sequence", "; did you mean 'sequence_sum'?"),
        (
            "algorithm.clip_hihg=0.3",
            "unknown key 'algorithm.clip_hihg'; did you mean 'algorithm.clip_high'?",
        ),
        (
            "algorithm.rollout_is_threshold=1",
            "algorithm.rollout_is_threshold must be more than 1, not 1.",
        ),
        (
            "algorithm.dynamic_sampling_rounds=-1",
            "algorithm.dynamic_sampling_rounds must be at least 0, not -1.",
        ),
    ],
)
def test_mistakes(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert sentence in str(error.value)


def test_the_page_shows_the_presets() -> None:
    lines = (ROOT / "docs" / "algorithms.md").read_text().splitlines()
    for name, values in ALGORITHM_PRESETS.items():
        (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        (published,) = [cell for cell in row.split(" | ") if cell.startswith("`{")]
        assert yaml.safe_load(published.strip("` |")) == values
