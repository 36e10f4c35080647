"""Paths that are not checkpoints and tokenizers that do not fit: the message names what to give."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_vrl.checkpoint.convert import convert_to_hf, convert_to_megatron
from megatron_vrl.errors import CheckpointError
from megatron_vrl.evaluation.generate import inference_config
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.vocabulary import check_tokenizer_files
from megatron_vrl.storage.no_checkpoint import advice, newest
from tests.running import ROOT, run_python


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run directory with three checkpoints, one of them half written, and an export."""
    run = tmp_path / "run"
    for name in ("sft-000100", "grpo-0-000240", "grpo-0-000120", "grpo-0-000360.partial"):
        (run / "checkpoints" / name / "weights").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("grpo-0-000240\n")
    (run / "export").mkdir()
    (run / "export" / "config.json").write_text("{}")
    return run


def sentences(path: Path, tmp_path: Path) -> Iterator[str]:
    """Return the error messages of each program for a path."""
    for read in (
        lambda: read_architecture(path),
        lambda: inference_config(str(path), []),
        lambda: convert_to_hf(path, tmp_path / "new"),
        lambda: convert_to_megatron(path, tmp_path / "new"),
    ):
        with pytest.raises(CheckpointError) as error:
            read()
        assert "\n" not in str(error.value)
        yield str(error.value)


def test_a_directory_of_checkpoints_names_the_newest(run: Path, tmp_path: Path) -> None:
    place = run / "checkpoints"
    for sentence in sentences(place, tmp_path):
        assert sentence == (
            f"{place} holds checkpoints and is none: choose one, the newest is "
            f"{place / 'grpo-0-000240'}."
        )


def test_a_run_names_its_export_and_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    for sentence in sentences(run, tmp_path):
        assert f"{run / 'export'} (Hugging Face) or {run}/checkpoints/grpo-0-000240" in sentence
    shutil.rmtree(run / "export")
    assert "(Hugging Face)" not in advice(run) and "grpo-0-000240" in advice(run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert "has no checkpoint yet" in advice(run)


def test_a_missing_latest_falls_back_to_modification_time(run: Path) -> None:
    place = run / "checkpoints"
    (place / "latest").write_text("grpo-0-000999")
    (place / "grpo-0-000120" / "state.json").write_text("{}")
    assert newest(place) == place / "grpo-0-000120"


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen2.5-VL-3B-Instruct/",
        "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct",
        "hf://Qwen/Qwen2.5-VL-3B-Instruct",
    ],
)
def test_a_hub_id_names_the_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for sentence in sentences(Path(name), tmp_path):
        assert (
            "hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir "
            "checkpoints/Qwen2.5-VL-3B-Instruct" in sentence
        )


def test_a_mistyped_path_is_no_hub_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for name in ("checkpoints/grpo", "nowhere", "/a/b", "./a/b/c", "../a/b"):
        assert advice(Path(name)) == ""


def test_the_cache_of_the_hub_and_an_adapter(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--X" / "snapshots" / "0f3a"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert f"the newest is {snapshot}" in advice(tmp_path / "models--Qwen--X")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter without its base model: merge"):
        read_architecture(tmp_path)


# ---- the tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint whose tokenizer has exactly as many tokens as the embedding has rows."""
    out = tmp_path_factory.mktemp("tokens") / "hf"
    done = run_python(ROOT / "tools" / "make_tiny_model.py", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("special", [False, True])
def test_more_tokens_than_rows_is_a_sentence(whole: Path, tmp_path: Path, special: bool) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    arch = read_architecture(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer_files(folder, arch)
    room = arch.vocab - len(tokenizer)
    tokenizer.add_tokens([f"<more {i}>" for i in range(room + 1)], special_tokens=special)
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=f"{arch.vocab + 1} tokens.* has {arch.vocab} rows"):
        check_tokenizer_files(folder, arch)


def test_more_rows_than_tokens_is_usual(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] if "vocab_size" in config.get("text_config", {}) else config
    text["vocab_size"] += 64
    (folder / "config.json").write_text(json.dumps(config))
    check_tokenizer_files(folder, read_architecture(folder))
