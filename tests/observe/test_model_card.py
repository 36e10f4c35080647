"""Model card of an export: front matter, recipe, results, and no path of the machine."""

import yaml

from megatron_vrl.config import load_config
from megatron_vrl.observe.model_card import model_card
from tests.running import ROOT

RESULTS = {
    "sft": {"heldout": {"temporal_grounding/miou": 0.43, "format_rate": 1.0}},
    "grpo": {"heldout": {"temporal_grounding/miou": 0.898, "format_rate": 1.0}},
}
TRIVIAL = {"heldout": {"whole | video": {"temporal_grounding/miou": 0.25}}}


def card(*overrides: str) -> str:
    cfg = load_config(ROOT / "configs/quickstart.yaml", list(overrides))
    return model_card(cfg, RESULTS, TRIVIAL)


def test_front_matter_is_what_the_hub_reads() -> None:
    _, front, text = card("model.checkpoint=/home/me/models/Qwen2.5-VL-3B").split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model"] == "Qwen2.5-VL-3B"
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "video-text-to-text")
    assert "/home/me" not in text and "runs/" not in text


def test_recipe_and_results_are_those_of_the_run() -> None:
    rows = [line for line in card("grpo.steps=7", "algorithm.kl=0.04").splitlines() if "|" in line]
    assert (
        "| RL (grpo) | 7 steps of 32 prompts x 8 answers, rate 0.0006, KL 0.04, temperature 1 |"
    ) in rows
    assert "| reward of temporal_grounding | 0.5 format, 0.5 temporal_iou |" in rows
    assert not any("multiple_choice |" in row for row in rows)  # a task without results
    assert "|  | mIoU | format |" in rows
    assert "| after GRPO | 89.8 | 100.0 |" in rows
    assert any(row.startswith(r"| whole \| video | 25.0 |") for row in rows)


def test_adapters_are_named() -> None:
    frozen = ("model.freeze_vision=true", "model.freeze_merger=true")
    text = card("model.lora.rank=8", "model.lora.alpha=16", *frozen)
    assert "| LoRA | rank 8, alpha 16, merged into the weights |" in text
    assert "| LoRA" not in card()


def test_a_run_of_one_phase_names_no_other() -> None:
    text = card("sft.steps=0", "model.freeze_vision=true")
    assert "| SFT" not in text
    assert "| frozen | vision tower |" in text
