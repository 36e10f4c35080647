"""The tiny checkpoint: whole, loadable by transformers, divisible, and short in tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.weight_map import num_parameters
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Sample, VideoClip

declare_missing_ops()

import make_tiny_model  # noqa: E402
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor  # noqa: E402

GROUNDING = Sample(
    id="clip/0",
    task="temporal_grounding",
    media=(VideoClip("clip.mp4"),),
    duration_s=16.0,
    query="the red square is visible",
    rationale="the red square is visible",
    intervals_s=((3.0, 7.0),),
    options=(),
    option="",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model.main([f"--out={out}"])
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def processor(folder: Path) -> Qwen2_5_VLProcessor:
    return Qwen2_5_VLProcessor.from_pretrained(folder)


def test_transformers_answers_a_video_with_it(folder: Path, processor: Qwen2_5_VLProcessor) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    content: Any = [
        {"type": "video"},
        {"type": "text", "text": TASKS[GROUNDING.task].question(GROUNDING)},
    ]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    video = np.random.default_rng(0).integers(0, 256, (16, 112, 112, 3), dtype=np.uint8)
    inputs = processor(text=[prompt], videos=[video], return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[8, 2, 2]]  # 112 px were shrunk to 28
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 8
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], 512) and logits.isfinite().all()


def test_the_template_is_qwens(processor: Qwen2_5_VLProcessor) -> None:
    turn: Any = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When?"}]}
    ]
    rendered = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>When?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_numbers_are_single_digits_and_words_single_tokens(processor: Qwen2_5_VLProcessor) -> None:
    tokenizer = processor.tokenizer
    for digit in "0123456789":
        assert len(tokenizer.encode(digit)) == 1
    assert len(tokenizer.encode("2026")) == 4
    target = TASKS[GROUNDING.task].target(GROUNDING)
    assert len(tokenizer.encode(target)) <= 31
    assert len(tokenizer.encode(TASKS[GROUNDING.task].question(GROUNDING))) <= 24


@pytest.mark.parametrize(
    "text", ["12.5 s, déjà vu: 象 🎬", "  two  spaces\n\n", "<think>x</think>"]
)
def test_any_text_survives(processor: Qwen2_5_VLProcessor, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_the_14_special_tokens_are_whole_and_last(
    folder: Path, processor: Qwen2_5_VLProcessor
) -> None:
    tokenizer = processor.tokenizer
    ids = [tokenizer.encode(token) for token in make_tiny_model.SPECIAL_TOKENS]
    assert ids == [[index] for index in range(512 - 14, 512)] and len(tokenizer) == 512
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_id in stops
    config = json.loads((folder / "config.json").read_text())
    for name in ("image_token", "video_token", "vision_start_token"):
        word = {"vision_start_token": "<|vision_start|>"}.get(name, f"<|{name[:5]}_pad|>")
        assert config[f"{name}_id"] == tokenizer.convert_tokens_to_ids(word)


def test_two_ranks_can_share_every_size(folder: Path) -> None:
    architecture = read_architecture(folder)
    vision = architecture.vision
    for size in (architecture.layers, architecture.heads, architecture.kv_heads, vision.heads):
        assert size % 2 == 0
    assert architecture.mlp % 2 == vision.mlp % 2 == 0 and architecture.vocab % 8 == 0
    assert architecture.kv_heads < architecture.heads  # grouped
    assert 0 < len(vision.full_attention_layers) < vision.layers  # windows as well
    assert sum(architecture.mrope_section) == architecture.head_dim // 2
    assert not architecture.tied_head
    tensors = stored(folder)
    assert sum(tensor.numel() for tensor in tensors.values()) == num_parameters(architecture)
    assert "visual.merger.mlp.0.weight" in tensors  # the published names
    spread = tensors["model.layers.0.mlp.up_proj.weight"].std().item()
    assert spread == pytest.approx(0.09, rel=0.05)


def test_the_seed_decides_the_weights(folder: Path, tmp_path: Path) -> None:
    weights = [stored(folder)]
    for name, seed in (("same", 1), ("other", 2)):
        make_tiny_model.main([f"--out={tmp_path / name}", f"--seed={seed}"])
        weights.append(stored(tmp_path / name))
    first, same, other = weights
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


RELEASED = [  # of Qwen/Qwen2.5-VL-3B-Instruct, without its README and LICENSE
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]


def test_the_files_are_those_that_were_released(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == RELEASED
    config = json.loads((folder / "config.json").read_text())
    assert "text_config" not in config and config["rope_scaling"]["type"] == "mrope"
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert "video" not in template
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()
    assert len(vocab) == 498 and not set(make_tiny_model.SPECIAL_TOKENS) & set(vocab)
    assert {"".join(merge.split()) for merge in merges[1:]} < set(vocab)


def test_both_layouts_are_one_model(
    folder: Path, processor: Qwen2_5_VLProcessor, tmp_path: Path
) -> None:
    """transformers reads the same numbers, tokens and pixel limits from either."""
    other = tmp_path / "other"
    make_tiny_model.main([f"--out={other}", "--layout=transformers-5"])
    assert (other / "chat_template.jinja").exists() and not (other / "vocab.json").exists()
    assert read_architecture(other) == read_architecture(folder)
    ours, theirs = stored(folder), stored(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = Qwen2_5_VLProcessor.from_pretrained(other)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.chat_template == processor.chat_template
    assert again.image_processor.size == processor.image_processor.size
    ids = torch.tensor([processor.tokenizer("<|im_start|>user\nwhen?<|im_end|>")["input_ids"]])
    with torch.no_grad():
        first, second = (
            Qwen2_5_VLForConditionalGeneration.from_pretrained(d).eval()(input_ids=ids).logits
            for d in (folder, other)
        )
    assert torch.equal(first, second)


def test_refusals(tmp_path: Path) -> None:
    for argument in ("--hidden=72", "--kv-heads=3", "--vision-hidden=60", "--vocab=511"):
        with pytest.raises(ConfigError, match=argument.split("=")[0]):
            make_tiny_model.main([f"--out={tmp_path / 'x'}", argument])
    with pytest.raises(ConfigError, match="at most"):
        make_tiny_model.main([f"--out={tmp_path / 'x'}", "--vocab=4096"])
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        make_tiny_model.main([f"--out={tmp_path}"])
