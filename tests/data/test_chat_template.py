"""Chat template: the one that transformers and vLLM use; user text stays text."""

import json
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.data.chat_template import ChatTokenizer
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.qwen2_5_vl.prompt import PROMPT, STRUCTURE_TOKENS
from megatron_vrl.rollout.vllm.special_tokens import banned_token_ids, stop_token_ids
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops

declare_missing_ops()

from make_tiny_model import (  # noqa: E402
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    make_processor,
    train_tokenizer,
)
from released_layout import TEXT_TEMPLATE  # noqa: E402
from transformers import AutoProcessor, AutoTokenizer  # noqa: E402

PADS = (511, 510)  # of a video and an image
MARKED = CHAT_TEMPLATE.replace("<|vision_start|>", "a film: <|vision_start|>")
BLIND = (
    "{% for m in messages %}{{ m.role }}:"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
)
ADDED = ["<tool_call>", "</think>"]  # not special


def put(directory: Path, name: str, template: object) -> None:
    """Write a template under one of the file names in use."""
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".jinja"):
        path.write_text(str(template))
    else:
        tree = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(tree | {"chat_template": template}))


def folder(released: Path, out: Path, templates: Mapping[str, object]) -> Path:
    shutil.copytree(released, out)
    (out / "chat_template.json").unlink()
    config = json.loads((out / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    for name, template in templates.items():
        put(out, name, template)
    return out


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


TOKENIZER, PROCESSOR = "tokenizer_config.json", "processor_config.json"
JSON, JINJA, MORE = "chat_template.json", "chat_template.jinja", "additional_chat_templates"
LAYOUTS: dict[str, Mapping[str, object]] = {
    "transformers 4": {JSON: MARKED, TOKENIZER: TEXT_TEMPLATE},
    "transformers 4, the processor's alone": {JSON: MARKED},
    "transformers 5": {JINJA: MARKED},
    "transformers 5 beside a text template": {JINJA: MARKED, TOKENIZER: TEXT_TEMPLATE},
    "the older file first": {JSON: MARKED, JINJA: CHAT_TEMPLATE},
    "processor_config.json first": {PROCESSOR: MARKED, JSON: CHAT_TEMPLATE},
    "several files": {JINJA: MARKED, f"{MORE}/tool_use.jinja": TEXT_TEMPLATE},
    "default in the folder": {f"{MORE}/default.jinja": MARKED},
    "the processor's are named": {PROCESSOR: {"default": MARKED, "rag": TEXT_TEMPLATE}},
}
NAMED = ("several files", "the processor's are named")  # vLLM does not choose among them
OF_TOKENIZER: dict[str, Mapping[str, object]] = {  # AutoProcessor has none, vLLM takes them
    "the tokenizer's": {TOKENIZER: MARKED},
    "the tokenizer's are named": {TOKENIZER: named(default=MARKED, tool_use=TEXT_TEMPLATE)},
}
QUESTION: list[Any] = [
    {"role": "system", "content": "Look well."},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When?"}]},
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_template_is_that_of_auto_processor(released: Path, tmp_path: Path, name: str) -> None:
    directory = folder(released, tmp_path / "x", LAYOUTS[name])
    processor = AutoProcessor.from_pretrained(directory)
    wanted = processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert "a film: <|vision_start|><|video_pad|><|vision_end|>When?" in wanted
    ids = ChatTokenizer(directory, PADS, STRUCTURE_TOKENS).turn_ids(QUESTION)
    assert ids == processor.tokenizer(wanted)["input_ids"]


def test_a_folder_saved_by_transformers_renders_the_same(released: Path, tmp_path: Path) -> None:
    make_processor(train_tokenizer(512), 784, 784).save_pretrained(tmp_path)
    assert not (tmp_path / JSON).exists() and (tmp_path / JINJA).exists()
    saved = ChatTokenizer(tmp_path, PADS, STRUCTURE_TOKENS).turn_ids(QUESTION)
    assert saved == ChatTokenizer(released, PADS, STRUCTURE_TOKENS).turn_ids(QUESTION)


@pytest.mark.slow  # imports vLLM
@pytest.mark.parametrize("name", [*(n for n in LAYOUTS if n not in NAMED), *OF_TOKENIZER])
def test_the_template_is_that_of_vllm(released: Path, tmp_path: Path, name: str) -> None:
    from megatron_vrl.rollout.vllm.startup import import_vllm

    import_vllm()
    from vllm.config import ModelConfig
    from vllm.renderers.hf import safe_apply_chat_template

    directory = folder(released, tmp_path / "x", (LAYOUTS | OF_TOKENIZER)[name])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = safe_apply_chat_template(
        ModelConfig(model=str(directory), dtype="float32"),
        tokenizer,
        QUESTION,
        add_generation_prompt=True,
    )
    assert ids == ChatTokenizer(directory, PADS, STRUCTURE_TOKENS).turn_ids(QUESTION)


@pytest.mark.parametrize(
    ("templates", "sentence"),
    [
        ({}, "has no chat template; take chat_template.json"),
        ({TOKENIZER: TEXT_TEMPLATE}, "does not render a message with a video (can only concat"),
        (
            {JINJA: BLIND},
            "renders 0 vision tokens for a message with one video (video_token_id=511); ",
        ),
        ({JSON: TEXT_TEMPLATE, TOKENIZER: MARKED}, "does not render a message with a video"),
        ({JINJA: MARKED + "<|video_pad|>"}, "renders 2 vision tokens for a message with one"),
        ({JINJA: "{% for %}"}, "does not render a message with a video (Expected an expression"),
        ({JINJA: "{{ raise_exception('text only') }}"}, "with a video (text only); take"),
        ({JINJA: ""}, "renders 0 vision tokens"),
        ({JSON: ["x"]}, "has no chat template"),
        ({f"{MORE}/rag.jinja": MARKED}, "has the chat templates rag and none called default"),
        ({TOKENIZER: named(rag=MARKED)}, "has the chat templates rag and none called default"),
        ({JSON: MARKED, f"{MORE}/rag.jinja": MARKED}, "its chat template cannot be read (Cannot"),
    ],
)
def test_a_checkpoint_without_a_vision_template(
    released: Path,
    tmp_path: Path,
    templates: dict[str, Any],
    sentence: str,
) -> None:
    directory = folder(released, tmp_path / "x", templates)
    with pytest.raises(CheckpointError) as error:
        ChatTokenizer(directory, PADS, STRUCTURE_TOKENS)
    assert sentence in str(error.value) and str(error.value).startswith(str(directory))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"chat_template": '])
def test_a_broken_template_file(released: Path, tmp_path: Path, text: str) -> None:
    directory = folder(released, tmp_path / "x", {})
    (directory / JSON).write_text(text)
    with pytest.raises(CheckpointError, match="its chat template cannot be read"):
        ChatTokenizer(directory, PADS, STRUCTURE_TOKENS)


# ---- text stays text


@pytest.fixture(scope="module")
def chats(released: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ChatTokenizer]:
    """Return chats with a template that keeps text, one that strips it, and one that adds words."""
    base = tmp_path_factory.mktemp("templates")
    stripped = CHAT_TEMPLATE.replace("content['text'] }}", "content['text'] | trim }}")
    stripped = stripped.replace("message['content'] }}", "message['content'] | trim }}")
    assert stripped.count("| trim") == 2
    directories = [released, folder(released, base / "stripped", {JSON: stripped})]
    added = folder(released, base / "added", {JSON: CHAT_TEMPLATE})
    tokenizer = AutoTokenizer.from_pretrained(added)
    tokenizer.add_tokens(ADDED)
    tokenizer.save_pretrained(added)
    return [ChatTokenizer(directory, PADS, STRUCTURE_TOKENS) for directory in [*directories, added]]


def turn(system: str | None, question: str, visuals: int) -> list[dict[str, Any]]:
    content = [{"type": "video"}] * visuals + [{"type": "text", "text": question}]
    asked = [{"role": "user", "content": content}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]


WORDS = [
    "\n",
    " ",
    "\t",
    "user",
    "\r\n",
    "é",
    "e\u0301",
    "\u0338",
    "象",
    "🎬",
    "'s",
    "42",
    "<",
    "|>",
]
PIECES = st.one_of(st.sampled_from(WORDS), st.text(max_size=3), st.sampled_from(ADDED))
PLAIN = st.lists(PIECES, max_size=8).map("".join)
CUT = st.sampled_from(SPECIAL_TOKENS).flatmap(
    lambda token: st.tuples(st.just(token), st.integers(1, len(token))).map(lambda c: c[0][: c[1]])
)
ANY = st.lists(st.one_of(PIECES, st.sampled_from(SPECIAL_TOKENS), CUT), max_size=8).map("".join)


def has_special(text: str) -> bool:
    return any(token in text for token in SPECIAL_TOKENS)


@given(system=st.none() | PLAIN, question=PLAIN, visuals=st.integers(0, 2))
def test_without_special_tokens_the_ids_are_those_of_the_rendered_text(
    chats: list[ChatTokenizer], system: str | None, question: str, visuals: int
) -> None:
    """BPE may merge letters of the template with letters of the text."""
    for chat in chats:
        messages = turn(system, question, visuals)
        template = json.loads((Path(chat.directory) / JSON).read_text())["chat_template"]
        ids = chat.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert chat.turn_ids(messages) == ids


@given(system=st.none() | ANY, question=ANY, visuals=st.integers(0, 2))
def test_no_text_becomes_a_special_token(
    chats: list[ChatTokenizer], system: str | None, question: str, visuals: int
) -> None:
    for chat in chats:
        ids = chat.turn_ids(turn(system, question, visuals))
        plain = chat.turn_ids(turn(None if system is None else "s", "q", visuals))
        special = set(chat.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
        assert [i for i in ids if i in special] == [i for i in plain if i in special]


@given(system=ANY, question=ANY)
def test_a_prompt_decodes_to_its_question(
    chats: list[ChatTokenizer], system: str, question: str
) -> None:
    """Decoded ids give the text in NFC, which the tokenizer normalizes to."""
    chat = chats[0]
    text = chat.tokenizer.decode(chat.turn_ids(turn(system, question, 1)))
    wanted = (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", wanted)


@given(ANY)
def test_an_answer_decodes_to_its_text(chats: list[ChatTokenizer], text: str) -> None:
    for chat in chats:
        ids = chat.text_ids(text)
        assert not set(ids) & set(chat.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
        read = chat.tokenizer.decode(ids, skip_special_tokens=True)  # as the engine reads it
        assert unicodedata.normalize("NFC", read) == unicodedata.normalize("NFC", text)
        if not has_special(text):
            assert ids == chat.tokenizer(text)["input_ids"]


def test_added_tokens_that_are_not_special_stay_text(chats: list[ChatTokenizer]) -> None:
    """<tool_call> is not special: decoding keeps it and it ends no turn."""
    chat = chats[-1]
    for word in ADDED:
        (id,) = chat.text_ids(word)
        assert id >= 512
        assert chat.tokenizer.decode([id], skip_special_tokens=True) == word
        assert id in chat.turn_ids(turn(None, f"a {word} b", 1))


def test_pads_and_stop_are_always_special(released: Path, tmp_path: Path) -> None:
    directory = folder(released, tmp_path / "x", {JSON: CHAT_TEMPLATE})
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text.replace('"special": true', '"special": false'))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text().replace('"special": true', '"special": false'))
    del config["additional_special_tokens"]
    path.write_text(json.dumps(config))
    chat = ChatTokenizer(directory, PADS, STRUCTURE_TOKENS)
    asked = "".join(STRUCTURE_TOKENS)
    structure = set(chat.tokenizer.convert_tokens_to_ids(list(STRUCTURE_TOKENS)))
    assert {511, 510, 500} < structure and not structure & set(chat.text_ids(asked))
    unmarked = AutoTokenizer.from_pretrained(directory)  # as the engine has it
    assert structure - set(stop_token_ids(unmarked, PROMPT)) <= set(
        banned_token_ids(unmarked, PROMPT, 512)
    )
    ids = chat.turn_ids(turn(None, asked, 1))
    assert (ids.count(511), ids.count(510), ids.count(500)) == (1, 0, 2)
