"""Prompts: one rendering for engine and trainer; too long is an error, not truncated."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.errors import CheckpointError, ConfigError, DataError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.rewards.score import score
from megatron_vrl.tasks import SYSTEM_PROMPTS, TASKS
from megatron_vrl.tasks.short_answer import ShortAnswer
from megatron_vrl.types import Sample, VideoClip
from tests.tiny import image, video

ARCHITECTURE = read_architecture(
    Path(__file__).parents[2] / "configs" / "models" / "qwen2.5-vl-3b.json"
)

SAMPLE: dict[str, Any] = {
    "id": "clip/0",
    "media": (VideoClip("clip.mp4"),),
    "duration_s": 8.0,
    "query": "the red square is visible",
    "rationale": "the red square is visible",
    "intervals_s": ((1.0, 3.0),),
    "options": ("red", "blue"),
    "option": "A",
    "truth": ShortAnswer(answer="red"),
}
CLIP = video((4, 4, 6), 2.0, seed=0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_tiny_model

    directory = tmp_path_factory.mktemp("prompt") / "hf"
    make_tiny_model.main(["--out", str(directory)])
    return directory


def encoder(
    published: Path,
    system_prompt: str = "think",
    max_tokens: int = 4096,
    wording: Literal["default", "temporal_r1"] = "default",
) -> tuple[PromptEncoder, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(published)
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert isinstance(pad, int) and isinstance(image, int)
    arch = replace(ARCHITECTURE, video_token=pad, image_token=image)
    return PromptEncoder(published, arch, system_prompt, max_tokens, wording), pad


def sample(task: str = "temporal_grounding") -> Sample:
    return Sample(task=task, **SAMPLE)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("system_prompt", SYSTEM_PROMPTS)
def test_one_pad_for_the_engine_one_per_cell_for_the_trainer(
    published: Path, task: str, system_prompt: str
) -> None:
    encode, pad = encoder(published, system_prompt)
    prompt = encode.prompt(sample(task), CLIP)
    compact, whole = list(prompt.engine_token_ids), prompt.token_ids.tolist()
    assert compact.count(pad) == 1
    assert whole.count(pad) == 4 * 4 * 6 // 4
    at = compact.index(pad)
    assert whole[:at] == compact[:at]
    assert whole[at : at + 24] == [pad] * 24
    assert whole[at + 24 :] == compact[at + 1 :]
    assert prompt.positions.shape == (3, len(whole))
    text = encode.tokenizer.decode(compact)
    assert TASKS[task].question(sample(task)) in text
    assert text.endswith("<|im_start|>assistant\n")
    assert (SYSTEM_PROMPTS[system_prompt] or "You are a helpful assistant.") in text
    assert text.index("<|video_pad|>") < text.index(TASKS[task].question(sample(task)))


@pytest.mark.parametrize("task", TASKS)
def test_the_sft_target_is_parsed_by_its_task(published: Path, task: str) -> None:
    encode, _ = encoder(published)
    *ids, stop = encode.target(sample(task)).tolist()
    assert encode.tokenizer.decode([stop]) == "<|im_end|>"
    assert TASKS[task].parse(encode.tokenizer.decode(ids), sample(task)).formatted


def test_without_thinking_the_target_has_no_rationale(published: Path) -> None:
    plain = replace(sample(), rationale="")
    think, _ = encoder(published, "think")
    answer, _ = encoder(published, "answer")
    assert answer.target(sample()).tolist() == think.target(plain).tolist()
    assert len(answer.target(sample())) < len(think.target(sample()))


@pytest.mark.parametrize("task", TASKS)
def test_answer_only_trains_on_the_answer_block(published: Path, task: str) -> None:
    encode, _ = encoder(published, "answer_only")
    text = encode.tokenizer.decode(encode.target(sample(task))[:-1].tolist())
    assert text.startswith("<answer>") and text.endswith("</answer>")
    weights = TASKS[task].default_weights
    assert score(sample(task), text, "answer_only", weights)[1] == 1.0
    assert score(sample(task), text, "strict", weights)[0]["format"] == 0.0


def test_a_long_prompt_is_an_error_not_truncated(published: Path) -> None:
    fits, _ = encoder(published)
    length = len(fits.prompt(sample(), CLIP).token_ids)
    exactly, _ = encoder(published, max_tokens=length)
    assert np.array_equal(
        exactly.prompt(sample(), CLIP).token_ids, fits.prompt(sample(), CLIP).token_ids
    )
    short, _ = encoder(published, max_tokens=length - 1)
    with pytest.raises(ConfigError) as error:
        short.prompt(sample(), CLIP)
    assert str(error.value) == (
        f"The prompt of sample clip/0 has {length} tokens, 24 of them vision, over "
        f"data.max_prompt_tokens={length - 1}: raise it, or lower video.total_pixels."
    )


def test_a_checkpoint_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer that loads"):
        PromptEncoder(tmp_path, ARCHITECTURE, "none", 10)


def test_the_released_wording(published: Path) -> None:
    asked_as_released = TASKS["multiple_choice"].temporal_r1_question
    assert asked_as_released is not None
    question = asked_as_released(sample("multiple_choice"))
    assert question == (
        "Question:the red square is visible\nOption:\n(A) red\n(B) blue\n"
        "Only give the best option.\n"
    )
    encode, _ = encoder(published, "temporal_r1", wording="temporal_r1")
    text = encode.tokenizer.decode(encode.prompt(sample("multiple_choice"), CLIP).engine_token_ids)
    assert text == (
        f"<|im_start|>system\n{SYSTEM_PROMPTS['temporal_r1']}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    for name in ("temporal_grounding", "grounded_qa"):
        text = encode.tokenizer.decode(encode.prompt(sample(name), CLIP).engine_token_ids)
        assert TASKS[name].question(sample(name)) in text  # no other wording was released


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wording", ["default", "temporal_r1"])
def test_a_special_token_in_an_annotation_is_text(
    published: Path, task: str, wording: Literal["default", "temporal_r1"]
) -> None:
    """Special tokens in query, option and rationale are text in prompt and target."""
    encode, _ = encoder(published, wording=wording)
    words = ["<|im_end|>", "<|video_pad|>", "<|endoftext|>", "<|vision_start|>", "<|im_start|>"]
    asked = replace(
        sample(task),
        query=f"he holds {words[0]} up, {words[1]}",
        rationale="a card with " + "".join(words),
        options=(f"red {words[1]}", words[2]),
    )
    prompt, clean = encode.prompt(asked, CLIP), encode.prompt(sample(task), CLIP)
    special = {encode.tokenizer.convert_tokens_to_ids(word) for word in words}
    for ids, plain in (
        (prompt.engine_token_ids, clean.engine_token_ids),
        (prompt.token_ids.tolist(), clean.token_ids.tolist()),
    ):
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert asked.query in encode.tokenizer.decode(prompt.engine_token_ids)
    *ids, stop = encode.target(asked).tolist()
    assert not special & set(ids) and encode.tokenizer.decode([stop]) == "<|im_end|>"
    text = encode.tokenizer.decode(ids, skip_special_tokens=True)  # as the engine reads it
    assert text == TASKS[task].target(asked)
    assert TASKS[task].parse(text, asked).formatted


def test_half_a_surrogate_pair_is_an_error_naming_the_sample(published: Path) -> None:
    encode, _ = encoder(published)
    spoiled = replace(sample(), query="a \ud83c", rationale="a \ud83c")
    for encoded in (lambda: encode.prompt(spoiled, CLIP), lambda: encode.target(spoiled)):
        with pytest.raises(DataError, match=r"sample clip/0 holds '\\ud83c', half of a surrogate"):
            encoded()


def test_a_template_without_images_is_refused_where_an_image_is_shown(
    published: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "hf"
    shutil.copytree(published, directory)
    path = directory / "chat_template.json"
    path.write_text(path.read_text().replace("<|image_pad|>", ""))
    encode, _ = encoder(directory)
    encode.encode("a", None, (CLIP, "?"))
    with pytest.raises(CheckpointError, match="does not show image as one pad token each"):
        encode.encode("a", None, (image((2, 2), 0), "?"))
