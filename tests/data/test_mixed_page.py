"""docs/your-data.md: its rows are read, and its example of mixed media runs as the page says."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from megatron_vrl.cli import check_data
from megatron_vrl.config import Source, load_config
from megatron_vrl.data.formats.training import read
from megatron_vrl.data.mix import load
from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.types import Prompt
from megatron_vrl.video import VideoReader
from tests.running import ENVIRONMENT, ROOT, python, run_here
from tests.video.conftest import write_clip

PAGE = (ROOT / "docs" / "your-data.md").read_text()
BLOCKS = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.M | re.S))
ROWS = re.findall(r"^\| `(\w+)`.*? \| `(\{.*\})` \|$", PAGE, re.M)


def test_every_minimal_row_is_read(tmp_path: Path) -> None:
    assert [form for form, _ in ROWS] == ["verl", "verl", "hf", "llamafactory"]
    for form, text in ROWS:
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        keys = {"prompt_key": "problem", "answer_key": "answer"} if "problem" in text else {}
        source = {"json_path": str(path), "data_folder": "/data", "format": form}
        (sample,) = read(Source.model_validate(source | keys))
        assert "How many?" in sample.query and sample.truth.answer == "3"
        assert [medium.path for medium in sample.media] == ["/data/a.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the files of the example."""
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(str(clips / "door.mp4"), num_frames=63, fps=2, size=(56, 56))
    for colour in ("red", "blue"):
        Image.new("RGB", (56, 56), colour).save(clips / f"{colour}.png")
    (grounding, *_) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    (tmp_path / "grounding.json").write_text(grounding)
    for name in ("make_mixed.py", "mixed.yaml"):
        (tmp_path / name).write_text(BLOCKS[f"file={name}"])
    program = [python(), "make_mixed.py"]
    subprocess.run(program, cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=60)
    return tmp_path


@pytest.mark.slow
def test_the_example_is_checked_and_becomes_prompts(
    folder: Path, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_here(check_data.main, "--config", "mixed.yaml", cwd=folder)
    assert (done.returncode, done.stdout) == (0, BLOCKS["check"]), done.stderr
    monkeypatch.chdir(folder)
    cfg = load_config("mixed.yaml")
    samples = load(cfg.data.train, cfg.run.seed)
    assert [(s.task, len(s.media)) for s in samples[:4]] == [
        ("short_answer", 1),
        ("short_answer", 2),
        ("short_answer", 0),
        ("temporal_grounding", 1),
    ]
    arch = read_architecture(released)
    encoder = PromptEncoder(released, arch, cfg.data.system_prompt, cfg.data.max_prompt_tokens)
    pipeline = PromptPipeline(VideoReader(cfg.video, family_of(arch).pixels), encoder)
    prompts = pipeline.load(samples)
    assert all(isinstance(prompt, Prompt) for prompt in prompts), prompts
    texts = [encoder.tokenizer.decode(p.engine_token_ids) for p in prompts if isinstance(p, Prompt)]
    assert texts[1] == BLOCKS["prompt"]
    assert json.dumps(texts[2]).count("pad|>") == 0
