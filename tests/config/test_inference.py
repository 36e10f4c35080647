"""inference.yaml: tools use the settings that the run used."""

import shutil
from pathlib import Path

import pytest
import yaml

from megatron_vrl.config import load_config
from megatron_vrl.config.inference import (
    INFERENCE_FILE,
    INFERENCE_KEYS,
    inference_files,
    read_inference,
)
from megatron_vrl.errors import ConfigError
from megatron_vrl.evaluation.generate import inference_config
from megatron_vrl.evaluation.logprobs import score_config
from megatron_vrl.evaluation.predict import TEMPORAL_R1_DEFAULTS
from tests.running import CONFIG
from tests.tiny_models import hf_model, save


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(hf_model(), tmp_path_factory.mktemp("export") / "hf")
    for name, text in inference_files(load_config(CONFIG)).items():
        (directory / name).write_text(text)
    return directory


def test_tools_use_the_settings_of_the_run(export: Path) -> None:
    run, found = load_config(CONFIG), inference_config(str(export), [])
    scored = score_config(str(export), [])
    for section, keys in INFERENCE_KEYS.items():
        for key in keys:
            assert getattr(getattr(found, section), key) == getattr(getattr(run, section), key)
    for key in INFERENCE_KEYS["video"]:
        assert getattr(scored.video, key) == getattr(run.video, key)
    assert scored.data.max_prompt_tokens == run.data.max_prompt_tokens
    assert found.data.train == [] and found.video.decoder == "dali"  # of this machine, not kept


def test_config_and_overrides_override_the_file(export: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"video": {"fps": 3.0, "min_frames": 6}}))
    found = inference_config(str(export), ["video.min_frames=8"], str(config))
    assert (found.video.fps, found.video.min_frames, found.video.max_pixels) == (3.0, 8, 784)
    seed = inference_config(str(export), [], "", TEMPORAL_R1_DEFAULTS)
    assert (seed.data.system_prompt, seed.video.min_pixels) == ("temporal_r1", 3136)
    assert seed.video.fps == 1.0
    assert score_config(str(export), ["video.fps=4"]).video.fps == 4


def test_without_the_file_the_defaults_hold(export: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(export, plain)
    (plain / INFERENCE_FILE).unlink()
    assert read_inference(plain) == {}
    assert inference_config(str(plain), []).video.fps == 2.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("video: {fsp: 1}", "unknown key 'video.fsp'; did you mean 'video.fps'?"),
        ("video: {fps: -1}", "video.fps must be more than 0, not -1"),
        ("[]", "holds a list, not sections"),
        ("a: [", "is not YAML"),
        ("model: {}", "unknown"),
    ],
)
def test_an_invalid_file_is_named(export: Path, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / INFERENCE_FILE).write_text(text)
    with pytest.raises(ConfigError) as error:
        read_inference(tmp_path)
    assert sentence in str(error.value) and str(tmp_path / INFERENCE_FILE) in str(error.value)
