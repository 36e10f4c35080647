"""Processor settings of a checkpoint are read and copied wherever they are stored.

transformers reads a processor's settings from processor_config.json if they are nested there, else
from the processor's own file. The video processor falls back to preprocessor_config.json.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from make_tiny_model import CHAT_TEMPLATE
from transformers import AutoProcessor

from megatron_vrl.checkpoint.hf_reader import copy_side_files
from megatron_vrl.data.chat_template import ChatTokenizer
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.models.qwen2_5_vl.prompt import STRUCTURE_TOKENS
from megatron_vrl.video.image import ImageRules, read_image_rules

IMAGE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
NESTED = "processor_config.json"
CLASS = {"processor_class": "Qwen2_5_VLProcessor"}


def image(fewest: int = 784, most: int = 1568) -> dict[str, Any]:
    size = {"shortest_edge": fewest, "longest_edge": most}
    return {"image_processor_type": "Qwen2VLImageProcessor", "size": size} | CLASS


def video(fewest: int = 3136, most: int = 6272) -> dict[str, Any]:
    size = {"shortest_edge": fewest, "longest_edge": most}
    return {"video_processor_type": "Qwen2VLVideoProcessor", "size": size} | CLASS


LAYOUTS: dict[str, dict[str, Any]] = {
    "one file": {IMAGE: image()},
    "one file with the older keys": {IMAGE: {"min_pixels": 784, "max_pixels": 1568} | CLASS},
    "a file each": {IMAGE: image(), VIDEO: video()},
    "a file each beside a flat one": {IMAGE: image(), VIDEO: video(), NESTED: CLASS},
    "both nested": {NESTED: {"image_processor": image(), "video_processor": video()} | CLASS},
    "image nested": {NESTED: {"image_processor": image()} | CLASS, VIDEO: video()},
    "video nested": {NESTED: {"video_processor": video()} | CLASS, IMAGE: image()},
    "nested before files": {
        NESTED: {"image_processor": image(), "video_processor": video()} | CLASS,
        IMAGE: image(12544, 25088),
        VIDEO: video(12544, 25088),
    },
    "nested without a size": {
        NESTED: {"image_processor": {"image_processor_type": "Qwen2VLImageProcessor"}} | CLASS,
        IMAGE: image(),
        VIDEO: video(),
    },
}
TEMPLATES = {  # files of transformers 5
    "chat_template.jinja": CHAT_TEMPLATE,
    "additional_chat_templates/rag.jinja": "{{ messages }}",
}


def folder(released: Path, out: Path, files: dict[str, Any]) -> Path:
    """Copy the released files, with the processors' settings in other files."""
    shutil.copytree(released, out)
    (out / IMAGE).unlink()
    for name, tree in files.items():
        (out / name).write_text(json.dumps(tree))
    return out


def processor_settings(directory: Path) -> dict[str, Any]:
    """Return the settings that AutoProcessor loads from a folder."""
    processor = AutoProcessor.from_pretrained(directory)
    tokenizer = processor.tokenizer
    return {
        "image": processor.image_processor.to_dict(),
        "video": processor.video_processor.to_dict(),
        "template": processor.chat_template,
        "tokens": [tokenizer.get_vocab(), tokenizer.special_tokens_map],
        "texts": tokenizer.chat_template,
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_processor_settings_are_read_and_copied_as_auto_processor_does(
    released: Path, tmp_path: Path, name: str
) -> None:
    directory = folder(released, tmp_path / "x", LAYOUTS[name])
    before = processor_settings(directory)
    size = before["image"]["size"]
    assert read_image_rules(directory, PIXELS) == ImageRules(
        min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"], pixels=PIXELS
    )
    ChatTokenizer(directory, (511, 510), STRUCTURE_TOKENS)
    copy_side_files(directory, tmp_path / "copy")
    assert processor_settings(tmp_path / "copy") == before


def test_more_chat_templates_are_copied(released: Path, tmp_path: Path) -> None:
    directory = folder(released, tmp_path / "x", LAYOUTS["a file each"])
    (directory / "chat_template.json").unlink()
    (directory / "additional_chat_templates").mkdir()
    (directory / "runs").mkdir()  # no file of a processor
    for name, template in TEMPLATES.items():
        (directory / name).write_text(template)
    before = processor_settings(directory)
    assert before["template"] == {"default": CHAT_TEMPLATE, "rag": "{{ messages }}"}
    copy_side_files(directory, tmp_path / "copy")
    assert processor_settings(tmp_path / "copy") == before
    assert not (tmp_path / "copy" / "runs").exists()


@pytest.mark.slow  # imports vLLM
@pytest.mark.parametrize("name", LAYOUTS)
def test_vllm_loads_every_layout(released: Path, tmp_path: Path, name: str) -> None:
    from megatron_vrl.rollout.vllm.startup import import_vllm

    import_vllm()
    from vllm.transformers_utils.processor import get_processor

    directory = folder(released, tmp_path / "x", LAYOUTS[name])
    (processor, before) = get_processor(str(directory)), processor_settings(directory)
    assert processor.image_processor.to_dict() == before["image"]
    assert processor.video_processor.to_dict() == before["video"]
