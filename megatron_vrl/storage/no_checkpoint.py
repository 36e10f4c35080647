"""Advice for a path that was given as a checkpoint but is not one.

Recognizes a run directory (`export/`, `checkpoints/`), a directory of checkpoints, the cache of
huggingface_hub, an adapter without its base model, and a model id on the Hugging Face hub.
"""

import re
from pathlib import Path

from megatron_vrl.storage.hf_files import ADAPTERS

_HUB_ID = re.compile(
    r"(?:https?:/+(?:www\.)?(?:huggingface|hf)\.co/|hf:/+)?([\w][\w.-]*/[\w][\w.-]*)/?"
)
_UNFINISHED = {".partial", ".damaged", ".old"}  # suffixes of incomplete checkpoints


def advice(path: Path) -> str:
    """Return one sentence that names the checkpoint to give instead of `path`; "" if unknown."""
    if not path.is_dir():
        return _hub_advice(path)
    if any((path / name).exists() for name in ADAPTERS):
        return (
            f"{path} is an adapter without its base model: merge the two (merge_and_unload of "
            "peft) and give the merged folder."
        )
    if (path / "checkpoints").is_dir() or (path / "export").is_dir():
        return _run_advice(path)
    checkpoint = newest(path) or newest(path / "snapshots")
    if checkpoint is None:
        return ""
    return f"{path} holds checkpoints and is none: choose one, the newest is {checkpoint}."


def newest(directory: Path) -> Path | None:
    """Return the newest checkpoint of a directory: by its file `latest`, else by time."""
    if not directory.is_dir():
        return None
    checkpoints = [child for child in directory.iterdir() if _is_checkpoint(child)]
    latest = directory / "latest"
    if latest.is_file():
        named = directory / latest.read_text(errors="replace").strip()
        if named in checkpoints:
            return named
    return max(checkpoints, key=lambda child: (child.stat().st_mtime, child.name), default=None)


def _is_checkpoint(path: Path) -> bool:
    """Return whether a path is a finished Megatron or HF checkpoint."""
    if path.suffix in _UNFINISHED:
        return False
    return (path / "weights").is_dir() or (path / "config.json").is_file()


def _run_advice(path: Path) -> str:
    """Return the advice for a run directory."""
    choices = []
    if (path / "export" / "config.json").is_file():
        choices.append(f"{path / 'export'} (Hugging Face)")
    if (checkpoint := newest(path / "checkpoints")) is not None:
        choices.append(f"{checkpoint} (Megatron, the newest)")
    if not choices:
        return f"{path} is the directory of a run that has no checkpoint yet: give a checkpoint."
    return f"{path} is the directory of a run and no checkpoint: give {' or '.join(choices)}."


def _hub_advice(path: Path) -> str:
    """Return the advice for a path that looks like a model id; "" if it does not."""
    match = _HUB_ID.fullmatch(str(path))
    if match is None or path.exists() or path.parent.is_dir():
        return ""
    name = match[1]
    local = f"checkpoints/{name.split('/')[1]}"
    return (
        f"{path} is not a directory here. If it is a model of the Hugging Face hub, download it: "
        f"hf download {name} --local-dir {local}; then give {local}."
    )
