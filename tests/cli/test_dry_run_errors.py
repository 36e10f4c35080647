"""Mistakes that a dry run of the main job finds before anything is written."""

import subprocess
from pathlib import Path

import pytest

from megatron_vrl.cli import train
from tests.running import CONFIG, ROOT, SHORT, run_here, run_python, sentence_of


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint: a dry run reads its tokenizer and chat template, too."""
    directory = tmp_path_factory.mktemp("errors") / "whole"
    done = run_python(ROOT / "tools" / "make_tiny_model.py", "--out", directory)
    assert (done.returncode, done.stderr) == (0, f"Written: {directory}\n")  # and no bars
    return directory


def dry_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(train.main, "--config", CONFIG, *SHORT, *arguments, "--dry-run", cwd=folder)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.checkpoint=nowhere", "Cannot read nowhere/config.json"),
        ("parallel.tensor=2", "needs a multiple of 2 processes"),
        ("grpo.mini_batches=3", "grpo.mini_batches=3 is more than the 2 groups of a step"),
    ],
)
def test_dry_run_finds_what_cannot_work(tmp_path: Path, override: str, sentence: str) -> None:
    assert sentence in sentence_of(dry_run(tmp_path, override))
    assert not any(tmp_path.iterdir())


def test_a_strict_dry_run_refuses_what_is_not_on_this_machine(
    with_tokenizer: Path, tmp_path: Path
) -> None:
    options = (f"model.checkpoint={with_tokenizer}", "sft.steps=0", "video.device=gpu")
    done = dry_run(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "not on this machine" in line]
    assert "# not on this machine: a GPU, which video.device=gpu needs" in notes
    assert "# not on this machine: annotation file" in "\n".join(notes)
    line = sentence_of(dry_run(tmp_path, *options, "--strict"))
    assert line.startswith("error: not on this machine: annotation file runs/quickstart/data/")
    assert line.endswith(", a GPU, which video.device=gpu needs.")


@pytest.mark.parametrize("out", ["taken", "taken/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_written_is_named_by_the_dry_run(
    with_tokenizer: Path, tmp_path: Path, out: str
) -> None:
    (tmp_path / "taken").touch()
    options = (f"model.checkpoint={with_tokenizer}", f"run.out_dir={out}")
    line = sentence_of(dry_run(tmp_path, *options))
    assert line.startswith(f"error: run.out_dir={out} cannot be written (")
