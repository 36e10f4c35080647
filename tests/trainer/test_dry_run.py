"""All annotation files are opened before a run starts: what is wrong names its key and its file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vrl.config import load_config
from megatron_vrl.errors import ConfigError, DataError
from megatron_vrl.trainer.dry_run import check
from tests.running import ROOT

RECIPE = ROOT / "configs" / "recipes" / "temporal_r1-3b.yaml"
GOOD = {"a": {"duration": 16.0, "timestamps": [[3.0, 8.0]], "sentences": ["the red square"]}}
KEYS = ["data.sft", "data.train", "data.evaluation.dev", "data.evaluation.heldout"]


@pytest.fixture
def check_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.chdir(ROOT)
    (tmp_path / "good.json").write_text(json.dumps(GOOD))

    def checked(key: str, path: str, form: str = "charades_sta", here: bool = False) -> list[str]:
        """Return the notes on a recipe whose sources are good, but for one of `key`."""
        source = {"json_path": str(tmp_path / "good.json"), "data_folder": str(tmp_path)}
        source |= {"format": "charades_sta"}
        wrong = source | {"json_path": path, "format": form}
        sources = {name: [source] for name in KEYS} | {key: [source, wrong]}
        overrides = [f"{name}={json.dumps(of_key)}" for name, of_key in sources.items()]
        overrides.append("model.architecture=configs/models/qwen2.5-vl-3b.json")
        return check(load_config(RECIPE, ["data.evaluation={}", *overrides]), 8, here).notes

    return checked


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "form", "sentence"),
    [
        ("nothere.json", None, "charades_sta", "Cannot read the annotations {}: No such file"),
        ("empty.json", "", "charades_sta", "{} is empty; give the annotations."),
        ("none.json", "{}", "charades_sta", "{} holds no sample."),
        ("none.json", "{}", "temporal_r1", "{} holds no sample."),
        ("none.json", "[]", "temporal_r1", "{} holds no sample."),
        (".", None, "charades_sta", "Cannot read the annotations {}: Is a directory."),
        (".", None, "temporal_r1", "Cannot read the annotations {}: Is a directory."),
        ("cut.jsonl", '{"dataset": "x"', "temporal_r1", "{}, line 1 is not JSON: Expecting ','"),
        ("other.json", json.dumps(GOOD), "temporal_r1", "{} does not look like temporal_r1 (a "
         "list); it looks like charades_sta."),
    ],
)  # fmt: skip
def test_each_source_is_opened(
    check_with: Callable[..., list[str]],
    tmp_path: Path,
    key: str,
    here: bool,
    name: str,
    content: str | None,
    form: str,
    sentence: str,
) -> None:
    path = tmp_path if name == "." else tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        check_with(key, str(path), form, here)
    assert str(error.value).startswith(f"{key}: {sentence.format(path)}")


def test_a_dry_run_may_be_on_another_machine_and_a_run_may_not(
    check_with: Callable[..., list[str]],
) -> None:
    notes = check_with("data.train", "/nowhere/annotations/train.json")
    assert "not on this machine: annotation file /nowhere/annotations/train.json" in notes
    with pytest.raises(DataError, match=r"data\.train: Cannot read the annotations /nowhere/"):
        check_with("data.train", "/nowhere/annotations/train.json", here=True)


@pytest.mark.parametrize("world", [1, 16])
def test_a_launcher_with_another_number_of_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        check(load_config(RECIPE, []), world)
    started = "1 process" if world == 1 else "16 processes"
    assert str(error.value) == (
        f"parallel.processes=8 and the launcher started {started}: set NPROC and NNODES of "
        f"launch/train.sh so that they give 8, or set parallel.processes={world}."
    )
