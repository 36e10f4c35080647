"""`adapters.json` of a checkpoint that holds adapters only: their settings, and their base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.errors import CheckpointError

ADAPTERS = "adapters.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersNote:
    """Content of adapters.json."""

    lora: dict[str, Any]  # settings of `model.lora` on which the tensors depend
    base: str  # model.checkpoint
    base_digest: str


def read_note(checkpoint: Path) -> AdaptersNote | None:
    """Return the note of a checkpoint; None if it holds whole weights.

    Raises CheckpointError if the file is damaged.
    """
    file = checkpoint / ADAPTERS
    if not file.is_file():
        return None
    try:
        return AdaptersNote(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): remove {checkpoint}.") from None
