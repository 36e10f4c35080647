"""Which file of a checkpoint lies where; what the loops and the converter both go by."""

from pathlib import Path

STATE = "state.json"


def is_megatron(checkpoint: Path) -> bool:
    return (checkpoint / "weights").is_dir()


def hf_dir_of(checkpoint: str | Path) -> Path:
    """Directory with the config, tokenizer and processor files of either kind of checkpoint."""
    inner = Path(checkpoint) / "published"
    return inner if inner.is_dir() else Path(checkpoint)
