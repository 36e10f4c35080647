#!/usr/bin/env python3
"""Make a tiny Qwen2.5-VL or Qwen3-VL with random weights: a whole checkpoint of 3 to 5 MB.

The classes of transformers build the model. Its files are those of the released
Qwen2.5-VL-3B-Instruct (released_layout.py) or Qwen3-VL-4B-Instruct (released_qwen3_vl.py), one for
one, so that every program that loads the released checkpoints loads this one. `--layout
transformers-5` writes the files that transformers 5 saves. All sizes divide by 2 (tensor and
pipeline parallel), heads are grouped, one vision block of the Qwen2.5-VL has window attention and
one full attention. Weights have a standard deviation of about 1/sqrt(hidden), more than Qwen's
0.02: with 0.02 a model of this size was still on its first plateau after 800 steps of warm-up. Half
of the rotary pairs count time, see `make_config`. The byte-level BPE with Qwen2's rules is trained
on the texts of the tasks and of tools/make_synthetic.py, whose words are single tokens; other texts
take more tokens. The model knows nothing: warm it up before it can answer.
"""

import argparse
import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import released_qwen3_vl
from released_layout import write_released
from synthetic.clips import COLOURS, KINDS
from synthetic.clips import TASKS as TASKS_OF_SET

from megatron_vrl.errors import ConfigError
from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program
from megatron_vrl.tasks import SYSTEM_PROMPTS, TASKS
from megatron_vrl.types import Sample, VideoClip

PROMPTS = ("temporal_r1", "think", "answer")  # system prompts that the tokenizer learns from
SPECIAL_TOKENS = (  # in the order of the published vocabulary
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (  # as published with Qwen2.5-VL-Instruct, to the letter
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- tokenizer


def training_texts() -> list[str]:
    """Return every question and answer of the synthetic set, with the times of one clip only.

    Prompts and tasks are named, so that the model of a seed stays the same when others are added.
    """
    texts = [str(SYSTEM_PROMPTS[name]) for name in PROMPTS]
    texts += ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "0123456789"]
    colours = tuple(COLOURS)
    for (kind, colour), name in product(product(KINDS, colours), TASKS_OF_SET):
        task, grounding = TASKS[name], name == "temporal_grounding"
        phrase = f"the {colour} {kind} is visible"
        sample = Sample(
            id="",
            task="",
            media=(VideoClip(""),),
            duration_s=16.0,
            query=phrase if grounding else f"which colour is the {kind}?",
            rationale=phrase if grounding else colour,
            intervals_s=((3.0, 12.0),),
            options=colours[:4],
            option="B",
        )
        texts += [task.question(sample), task.target(sample)]
    return texts


def train_tokenizer(vocab: int, more_texts: list[str] | None = None) -> Any:
    """Return a tokenizer of exactly `vocab` tokens, special ones last as in the released one."""
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    # Qwen2Tokenizer brings the rules (NFC, Qwen2's split, byte level); only the merges are learnt.
    learner = Qwen2Tokenizer().backend_tokenizer
    learner.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(training_texts() + (more_texts or []), trainer)
    learnt = json.loads(learner.to_str())["model"]
    ids = learnt["vocab"]
    if len(ids) + len(SPECIAL_TOKENS) < vocab:
        raise ConfigError(
            f"--vocab {vocab} is more than the texts fill; give at most "
            f"{(len(ids) + len(SPECIAL_TOKENS)) // 8 * 8}."
        )
    ids |= {token: len(ids) + index for index, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=ids,
        merges=[tuple(pair) for pair in learnt["merges"]],  # type: ignore[misc]
        eos_token="<|im_end|>",
        extra_special_tokens=[*SPECIAL_TOKENS[3:], "<|im_start|>"],
        model_max_length=4096,
    )


def make_processor(tokenizer: Any, min_pixels: int, max_pixels: int) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        # The default of the cap changes between transformers versions, and token counts with it.
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


# ---- model


def make_config(args: argparse.Namespace, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    # Half the rotary pairs for time, where Qwen gives a quarter: a clip is one cell high and wide,
    # and with so few pairs a quarter holds no slow angle that orders its steps.
    pairs = args.hidden // args.heads // 2
    section = [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(  # type: ignore[call-arg]
        text_config={
            "vocab_size": args.vocab,
            "hidden_size": args.hidden,
            "intermediate_size": args.mlp,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": args.rope_base,
                "mrope_section": section,
            },
            "initializer_range": args.init_std,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": args.vision_layers,
            "hidden_size": args.vision_hidden,
            "intermediate_size": args.vision_mlp,
            "num_heads": args.vision_heads,
            "out_hidden_size": args.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [args.vision_layers - 1],
            "tokens_per_second": 2,
            "initializer_range": args.init_std,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
        initializer_range=args.init_std,
    )


def make_model(config: Any, seed: int) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.pad_token_id],
        pad_token_id=text.pad_token_id,
    )
    return model


# ---- the command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument(
        "--family",
        default="qwen2_5_vl",
        choices=["qwen2_5_vl", "qwen3_vl"],
        help="model family (default: qwen2_5_vl)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="random seed of the weights (default: 1)"
    )
    sizes = {
        "hidden": 128,
        "mlp": 256,
        "layers": 2,
        "heads": 4,
        "kv-heads": 2,
        "vision-hidden": 64,
        "vision-mlp": 128,
        "vision-layers": 2,
        "vision-heads": 2,
        "vocab": 512,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    for name in ("min-pixels", "max-pixels"):
        parser.add_argument(f"--{name}", type=int, help="of an image (default: those of one token)")
    parser.add_argument(
        "--layout",
        default="released",
        choices=["released", "transformers-5"],
        help="names and formats of the files (default: released)",
    )
    parser.add_argument("--init-std", type=float, default=0.09, help="default 0.09")
    parser.add_argument("--rope-base", type=float, default=10000.0, help="default 10000")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for sizes that do not divide."""
    rules = {
        f"--hidden {args.hidden} must be a multiple of 16 times --heads {args.heads}": args.hidden
        % (16 * args.heads),
        f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}": args.heads
        % args.kv_heads,
        f"--vision-hidden {args.vision_hidden} must be a multiple of 4 times --vision-heads "
        f"{args.vision_heads}": args.vision_hidden % (4 * args.vision_heads),
        f"--vocab {args.vocab} must be a multiple of 8": args.vocab % 8,
    }
    for rule, remainder in rules.items():
        if remainder:
            raise ConfigError(f"{rule}.")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check(args)
    if args.out.exists() and any(args.out.iterdir()):
        raise ConfigError(f"{args.out} is not empty; give another --out or remove it.")
    from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops

    declare_missing_ops()
    from transformers.utils import logging

    logging.disable_progress_bar()  # of writing two small shards
    third = args.family == "qwen3_vl"
    tokenizer = train_tokenizer(args.vocab, released_qwen3_vl.TEXTS if third else None)
    config = (released_qwen3_vl.make_config if third else make_config)(args, tokenizer)
    model = make_model(config, args.seed)
    half_made = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(half_made, ignore_errors=True)
    of_token = (2 * (released_qwen3_vl.PATCH if third else 14)) ** 2
    pixels = (args.min_pixels or of_token, args.max_pixels or of_token)
    if args.layout == "released":
        model.save_pretrained(half_made, max_shard_size=3 * model.num_parameters())
        if third:
            released_qwen3_vl.write_released(half_made, model.config, tokenizer, pixels)
        else:
            write_released(half_made, model.config, tokenizer, CHAT_TEMPLATE, pixels)
    else:
        model.save_pretrained(half_made)
        make = released_qwen3_vl.make_processor if third else make_processor
        make(tokenizer, *pixels).save_pretrained(half_made)
    os.replace(half_made, args.out)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    log_written(args.out)


if __name__ == "__main__":
    run_program(main)
