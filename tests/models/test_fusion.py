"""Gradient accumulation fusion: the decision, its description, and the config field it sets."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.spec_utils import build_module

from megatron_vrl.config import Model, Parallel
from megatron_vrl.models import vision_language_model as model
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.fusion import (
    FUSED_GRADIENT,
    GradientFusion,
    gradient_fusion,
    importable,
    with_gradient_fusion,
)
from megatron_vrl.models.qwen2_5_vl.vision import vision_config
from megatron_vrl.models.vision_language_model import language_config
from tests.running import ROOT

ARCH = read_architecture(ROOT / "configs" / "models" / "qwen2.5-vl-3b.json")


def asked(**model: Any) -> Model:
    return Model(checkpoint="none", **model)


@pytest.mark.parametrize(
    ("model", "on_gpu", "here", "on", "word"),
    [
        ({}, True, True, True, FUSED_GRADIENT),
        ({"layers": "transformer_engine"}, True, True, True, FUSED_GRADIENT),
        ({}, True, False, False, "is not installed"),
        ({"layers": "transformer_engine"}, True, False, False, "on for Transformer Engine's"),
        ({}, False, True, False, "no GPU"),
        ({"layers": "fp8_emulated", "fp8": "current"}, True, True, False, "layers=fp8_emulated"),
        (
            {"gradient_accumulation_fusion": "none"},
            True,
            True,
            False,
            "model.gradient_accumulation_fusion=none",
        ),
    ],
)
def test_the_decision_and_its_description(
    model: dict[str, str], on_gpu: bool, here: bool, on: bool, word: str
) -> None:
    probed: list[str] = []

    def probe(name: str) -> bool:
        probed.append(name)
        return here

    found = gradient_fusion(asked(**model), on_gpu, probe)
    assert found.enabled == on and word in found.description
    alone = found.description.startswith("on for Transformer Engine's")
    assert found.in_transformer_engine == alone
    assert set(probed) <= {FUSED_GRADIENT}  # PyPI's apex answers to "apex"


def test_an_extension_that_cannot_be_loaded_is_not_importable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol')")
    (tmp_path / "built_for_this_torch.py").write_text("")
    importlib.invalidate_caches()
    assert not importable("no_such_extension") and not importable("built_for_another_torch")
    assert importable("built_for_this_torch")


@pytest.mark.parametrize("on", [False, True])
def test_language_model_and_vision_tower_use_the_decision(
    monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    monkeypatch.setattr(model, "gradient_fusion", lambda *_: GradientFusion(on, ""))
    config = language_config(ARCH, asked(), Parallel())
    vision = vision_config(ARCH.vision, asked(), config)
    assert (config.gradient_accumulation_fusion, vision.gradient_accumulation_fusion) == (on, on)


def test_layers_with_fusion_beside_layers_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's layer of the same config must not see it: it would ask for apex."""
    monkeypatch.setattr(model, "gradient_fusion", lambda *_: GradientFusion(False, ""))
    config = language_config(ARCH, asked(), Parallel())

    class Linear:
        def __init__(self, channels: int, *, config: Any, bias: bool) -> None:
            self.channels, self.config, self.bias = channels, config, bias

    built = build_module(with_gradient_fusion(Linear), 8, config=config, bias=True)
    assert (built.channels, built.bias) == (8, True)
    assert built.config.gradient_accumulation_fusion
    assert built.config.hidden_size == config.hidden_size
    assert not config.gradient_accumulation_fusion
