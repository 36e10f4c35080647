"""Check of a tokenizer's size against the rows of the embedding."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.architecture import Architecture


def check_tokenizer(tokenizer: Any, arch: Architecture, directory: str | Path) -> None:
    """Raise CheckpointError if a token of the tokenizer has no row in the embedding.

    Rows without a token are common, because vocab_size of config.json is often rounded up.
    """
    token, last = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if last >= arch.vocab:
        raise CheckpointError(
            f"{directory}: the tokenizer has {last + 1} tokens, the last one {token!r}, and the "
            f"embedding has {arch.vocab} rows (vocab_size of config.json): resize the embedding "
            "(resize_token_embeddings of transformers) or restore the tokenizer."
        )


def check_tokenizer_files(directory: str | Path, arch: Architecture) -> None:
    """Load the tokenizer of a checkpoint and check it. Raise CheckpointError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{directory} has no tokenizer that loads: {reason}") from None
    check_tokenizer(tokenizer, arch, directory)
