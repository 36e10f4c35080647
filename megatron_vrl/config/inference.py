"""`inference.yaml`: the settings that inference tools need beside exported weights.

The file holds the prompt settings, the rules for sampling frames, and the maximum answer length. It
holds no settings of the machine (decoder, engine, frame store) and none of the data.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from megatron_vrl.config import Data, Evaluation, RunConfig
from megatron_vrl.config.base import SECTION
from megatron_vrl.config.loader import read_tree, validate
from megatron_vrl.config.video import Video

INFERENCE_FILE = "inference.yaml"
INFERENCE_KEYS = {
    "data": (
        "system_prompt",
        "question",
        "timestamps",
        "max_prompt_tokens",
        "image_min_pixels",
        "image_max_pixels",
    ),
    "video": (
        "fps",
        "num_frames",
        "min_frames",
        "max_frames",
        "min_pixels",
        "max_pixels",
        "total_pixels",
    ),
    "evaluation": ("max_response_tokens",),
}
_HEADER = (
    "# Settings for inference. tools/ask.py, evaluate.py and score_responses.py read them;\n"
    "# --config and section.key=value override them.\n"
)


class _InferenceSections(BaseModel):
    """Schema of inference.yaml."""

    model_config = SECTION

    data: Data = Data()
    video: Video = Video()
    evaluation: Evaluation = Evaluation()


def inference_files(cfg: RunConfig) -> dict[str, str]:
    """Return the files {name: text} to write beside this run's exported weights."""
    sections = cfg.model_dump(mode="json")
    inference = {
        name: {key: sections[name][key] for key in keys} for name, keys in INFERENCE_KEYS.items()
    }
    return {INFERENCE_FILE: _HEADER + yaml.safe_dump(inference, sort_keys=False)}


def read_inference(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a checkpoint's `inference.yaml`; {} if there is none.

    Raise ConfigError if a key or a value is refused. The message names the file.
    """
    path = directory / INFERENCE_FILE
    if not path.exists():
        return {}
    tree = read_tree(path)
    sections = validate(_InferenceSections, tree, str(path), "set it in the file.")
    return sections.model_dump(mode="json", exclude_unset=True)
