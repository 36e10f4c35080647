"""Shipped configs and docs: YAML that loads, architectures with exact parameter counts, valid
links."""

import json
import re
from pathlib import Path

import pytest
from config_reference import reference

from megatron_vrl.config import Source, check_answer_form, load_config
from megatron_vrl.data.formats.records import VIDEO_SUFFIXES
from megatron_vrl.data.formats.training import read
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.models.weight_map import num_parameters
from megatron_vrl.trainer.dry_run import check
from megatron_vrl.video.rules import plan_frames
from tests.tiny_models import model_of_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
YAMLS = [*sorted((ROOT / "configs").glob("*.yaml")), *RECIPES]
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
RECIPE = ROOT / "configs" / "recipes" / "temporal_r1-3b.yaml"
# As their model pages and checkpoint indices count them; for the others we found no such source.
PUBLISHED_COUNTS = {
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen3-vl-8b": 8_767_123_696,
}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.sft.steps + cfg.grpo.steps > 0
    assert cfg.data.train or not cfg.grpo.steps
    assert cfg.data.sft or not cfg.sft.steps


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_has_its_source(path: Path) -> None:
    """A comment names the source of each value, except where the released recipe is one file."""
    assert f"]({path.name})" in (path.parent / "README.md").read_text()
    if path == RECIPE:
        return
    values = [line for line in path.read_text().splitlines() if re.match(r"\s+\w+: +[^\s#{]", line)]
    assert [line for line in values if " # " not in line and "out_dir" not in line] == []


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_architecture_counts_what_transformers_builds(path: Path) -> None:
    """The sum of hf_shapes, and transformers' modules on the meta device, share no code."""
    built = sum(parameter.numel() for parameter in model_of_config(path).parameters())
    assert num_parameters(read_architecture(path)) == built
    assert built == PUBLISHED_COUNTS.get(path.stem, built)


def test_the_recipe_passes_a_dry_run_on_eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    notes = "\n".join(check(load_config(RECIPE), 8).notes)
    assert "model: 3,754,622,976 parameters" in notes
    assert "layout: 8 processes = 8 replicas" in notes
    assert "a GRPO step: 16 prompts, 128 answers, 1 update" in notes


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_recipe_takes_every_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load_config(RECIPE, [f"model.architecture={path}", "parallel.tensor=2"])
    assert any("replicas of tensor 2" in note for note in check(cfg, 8).notes)


def test_a_dry_run_refuses_more_tokens_than_the_model_has_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load_config(RECIPE, ["data.max_prompt_tokens=128000", "rollout.max_response_tokens=4096"])
    with pytest.raises(ConfigError, match=r"are 132096 tokens, the model reads 128000: lower"):
        check(cfg, 8)


def test_a_dry_run_prints_the_pipeline_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3B over two stages, the tower weighing 24.9 layers and the head 1; a word too few."""
    monkeypatch.chdir(ROOT)
    published = json.loads((ROOT / "configs/models/qwen2.5-vl-3b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published | {"vocab_size": 151935}))
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.split=balanced"]
    cfg = load_config(RECIPE, [f"model.architecture={tmp_path / 'config.json'}", *layout])
    notes = check(cfg, 8).notes
    assert "layers of each pipeline stage: 6, 30" in notes
    padded = "padded to 151936 rows, which parallel.tensor=2 divides"
    assert any(padded in note for note in notes)


@pytest.mark.parametrize("duration_s", [5, 30, 180, 384, 3600])
def test_the_recipe_keeps_its_token_budget(duration_s: int) -> None:
    cfg = load_config(RECIPE)
    plan = plan_frames(duration_s * 30, 30.0, 360, 640, cfg.video, PIXELS)
    assert plan.num_tokens <= 2048 < cfg.data.max_prompt_tokens


def test_annotations_of_the_real_clips_lie_inside_them() -> None:
    path = ROOT / "configs" / "annotations" / "real_clips.json"
    records = json.loads(path.read_text())
    samples = read(Source(json_path=str(path), data_folder="clips", format="charades_sta"))
    assert all(name.endswith(VIDEO_SUFFIXES) for name in records)
    spans = [tuple(span) for record in records.values() for span in record["timestamps"]]
    assert [sample.intervals_s for sample in samples] == [(span,) for span in spans]  # none cut


def test_the_reference_of_the_configuration_is_up_to_date() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == reference(), (
        "run: python tools/config_reference.py > docs/config.md"
    )


@pytest.mark.parametrize(
    "page",
    sorted(
        [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "configs/recipes/README.md"]
    ),
)
def test_links_and_paths_in_the_pages_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    paths = re.findall(r"`((?:megatron_vrl|tools|launch|configs|tests|docs)/[\w./-]*\w)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_prompt_and_format_reward_agree_about_the_think_block() -> None:
    prompt, mode = "data.system_prompt=answer_only", "rewards.mode=answer_only"
    for overrides in ([prompt], [mode]):
        with pytest.raises(ConfigError, match="disagree about the think block: set both"):
            check_answer_form(load_config(RECIPE, overrides))
    for overrides in ([], [prompt, mode]):
        check_answer_form(load_config(RECIPE, overrides))
