"""Tokens that end an answer, and those that no answer may hold."""

from typing import Any

from megatron_vrl.types import STRUCTURE_TOKENS


def stop_token_ids(tokenizer: Any) -> list[int]:
    stops: list[int] = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return stops


def banned_token_ids(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Vision and other special tokens, and rows of the vocabulary that stand for no token."""
    special = set(tokenizer.all_special_ids)
    special |= {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in STRUCTURE_TOKENS
    }
    no_token = set(range(len(tokenizer), vocab_size))
    return tuple(sorted((special | no_token) - set(stop_token_ids(tokenizer))))
