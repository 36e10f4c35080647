"""Layouts and checkpoints that a model cannot have: one sentence that names the value or file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vrl.checkpoint.hf_reader import HFCheckpoint
from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import CheckpointError, ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.pipeline_split import check_divides
from megatron_vrl.models.precision import check_available
from tests.tiny_models import hf_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("errors") / "hf")


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"tensor": 3}, "parallel.tensor=3 does not divide the model's 4 attention heads"),
        ({"tensor": 4}, "parallel.tensor=4 does not divide the model's 2 KV heads"),
        (
            {"pipeline": 3},
            "parallel.pipeline=3 x parallel.virtual=1 does not divide the model's 4 layers",
        ),
        (
            {"pipeline": 2, "virtual": 4},
            "parallel.pipeline=2 x parallel.virtual=4 asks for more chunks than the model's 4",
        ),
        (
            {"pipeline": 2, "layers_per_chunk": [1, 2]},
            "parallel.layers_per_chunk=[1, 2] must hold pipeline x virtual = 2 counts that add up",
        ),
    ],
)
def test_sizes_that_do_not_divide(checkpoint: Path, layout: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_divides(read_architecture(checkpoint), Model(checkpoint=""), Parallel(**layout))
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"layers": "transformer_engine"},
            "model.layers=transformer_engine, but this machine has no GPU: set "
            "model.layers=megatron and model.fp8=none.",
        ),
        (
            {"layers": "fp8_emulated", "fp8": "current"},
            "model.layers=fp8_emulated with model.fp8=current and parallel.tensor=2: emulation "
            "needs FP8 and one tensor rank; set model.fp8 and parallel.tensor=1.",
        ),
        (
            {"fp8": "delayed"},
            "model.fp8=delayed is computed by Transformer Engine only: set "
            "model.layers=transformer_engine (or fp8_emulated), or model.fp8=none.",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_available(Model(checkpoint="", **model), Parallel(tensor=2), torch.device("cpu"))
    assert str(error.value) == sentence


def test_checkpoints_that_are_not_there_or_of_another_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot read .*nowhere"):
        read_architecture(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type='llama', not 'qwen2_5_vl'"):
        read_architecture(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["vision_config"]["window_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks the key 'window_size'"):
        read_architecture(tmp_path)


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    hf_model().save_pretrained(directory, max_shard_size="200KB")
    arch = read_architecture(directory)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    whole = HFCheckpoint(directory, arch)
    with pytest.raises(CheckpointError, match=r"lacks the tensor visual\.nothing"):
        whole.tensor("visual.nothing")
    aside = shards[1].rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"lacks its shard {shards[1].name}"):
        HFCheckpoint(directory, arch)
    shards[1].write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is damaged"):
        HFCheckpoint(directory, arch)
    aside.rename(shards[1])
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"but no model\.safetensors, and no model"):
        HFCheckpoint(directory, arch)
