"""Tokens that end a rollout, and tokens that no rollout may contain."""

from typing import Any

from megatron_vrl.models.family import PromptForm


def stop_token_ids(tokenizer: Any, form: PromptForm) -> list[int]:
    """Return the ids of the family's stop tokens."""
    stops: list[int] = tokenizer.convert_tokens_to_ids(list(form.stop_tokens))
    return stops


def banned_token_ids(tokenizer: Any, form: PromptForm, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that no rollout may contain, ascending.

    These are vision and other special tokens, and rows of the embedding without a token. Stop
    tokens are allowed.
    """
    special = set(tokenizer.all_special_ids)
    special |= {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in form.structure_tokens
    }
    no_token = set(range(len(tokenizer), vocab_size))
    return tuple(sorted((special | no_token) - set(stop_token_ids(tokenizer, form))))
