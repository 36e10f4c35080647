"""Write the files beside a checkpoint's weights as Qwen2.5-VL-3B-Instruct was released.

That is the layout of transformers 4: a flat config.json; the vision template in
chat_template.json beside one for text alone in tokenizer_config.json; vocab.json and merges.txt
beside tokenizer.json; one preprocessor_config.json for images and videos. What transformers 5 saves
has other names (chat_template.jinja, processor_config.json) and keys.
"""

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

TEXT_TEMPLATE = (  # as in the released tokenizer_config.json, without its tools
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)


def write_released(
    directory: Path, config: Any, tokenizer: Any, template: str, pixels: tuple[int, int]
) -> None:
    """Write the files, replacing those of equal names. `pixels` is (fewest, most) of an image."""
    files = {
        "config.json": released_config(config.to_dict()),
        "generation_config.json": generation_config(config.text_config),
        "chat_template.json": {"chat_template": template},
        "preprocessor_config.json": _preprocessor(*pixels),
    }
    for name, tree in files.items():
        _write(directory / name, tree)
    write_tokenizer(directory, tokenizer, TEXT_TEMPLATE)


def released_config(config: Json) -> Json:
    """Return the config with the language model's keys at the top level, as in transformers 4."""
    text, vision = config["text_config"], config["vision_config"]
    rope = text["rope_parameters"]
    own = (
        "attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
        "intermediate_size max_position_embeddings max_window_layers num_attention_heads "
        "num_hidden_layers num_key_value_heads rms_norm_eps use_cache use_sliding_window vocab_size"
    )
    seen = (
        "depth hidden_act hidden_size intermediate_size num_heads out_hidden_size patch_size "
        "spatial_merge_size window_size fullatt_block_indexes tokens_per_second temporal_patch_size"
    )
    tokens = "vision_start_token_id vision_end_token_id image_token_id video_token_id"
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{key: text[key] for key in own.split()},
        **{key: config[key] for key in tokens.split()},
        "vision_token_id": config["image_token_id"] - 1,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 32768,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "vision_config": {
            **{key: vision[key] for key in seen.split()},
            "in_chans": vision["in_channels"],
            "spatial_patch_size": vision["patch_size"],
        },
    }


def generation_config(text: Any) -> Json:
    """Return generation_config.json for the language model's config."""
    return {
        "bos_token_id": text.bos_token_id,
        "pad_token_id": text.pad_token_id,
        "do_sample": True,
        "eos_token_id": [text.eos_token_id, text.pad_token_id],
        "repetition_penalty": 1.05,
        "temperature": 0.000001,
        "transformers_version": "4.49.0",
    }


def _preprocessor(fewest: int, most: int) -> Json:
    return {
        "min_pixels": fewest,
        "max_pixels": most,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def write_tokenizer(directory: Path, tokenizer: Any, template: str) -> None:
    """Write the tokenizer files, with `template` as the tokenizer's own chat template.

    Special tokens are in tokenizer.json only, not in vocab.json.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in tree["added_tokens"]}
    vocab = {word: id for word, id in tree["model"]["vocab"].items() if word not in added}
    tree["model"]["vocab"] = vocab
    _write(directory / "tokenizer.json", tree)
    _write(directory / "vocab.json", vocab)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tree["model"]["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokens = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tree["added_tokens"]
    }
    special = [token["content"] for token in tree["added_tokens"] if token["special"]]
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": tokens,
        "additional_special_tokens": [word for word in special if word != tokenizer.pad_token],
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.eos_token,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write(directory / "tokenizer_config.json", config)


def _write(path: Path, tree: Json) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
