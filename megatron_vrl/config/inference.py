"""`inference.yaml` beside exported weights: how a run asked its model, for the tools that ask it.

It holds the prompt's form, the rules by which frames are taken, and the longest answer. Left out:
what depends on the machine (decoder, engine, stores) or on the data.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from megatron_vrl.config import Data, Evaluation, RunConfig
from megatron_vrl.config.base import SECTION
from megatron_vrl.config.loader import checked, read_tree
from megatron_vrl.config.video import Video

INFERENCE_FILE = "inference.yaml"
KEPT = {
    "data": ("system_prompt", "question", "max_prompt_tokens"),
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
    "# How the run asked this model. tools/ask.py, evaluate.py and score_responses.py read it;\n"
    "# --config and section.key=value go before it.\n"
)


class _Kept(BaseModel):
    model_config = SECTION

    data: Data = Data()
    video: Video = Video()
    evaluation: Evaluation = Evaluation()


def inference_files(cfg: RunConfig) -> dict[str, str]:
    """Return the files (name -> text) that go beside weights of this run."""
    sections = cfg.model_dump(mode="json")
    kept = {name: {key: sections[name][key] for key in keys} for name, keys in KEPT.items()}
    return {INFERENCE_FILE: _HEADER + yaml.safe_dump(kept, sort_keys=False)}


def read_inference(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a checkpoint's `inference.yaml`; {} where there is none.

    Raises ConfigError, naming the file, if a key or a value is refused.
    """
    path = directory / INFERENCE_FILE
    if not path.exists():
        return {}
    tree = read_tree(path)
    kept = checked(_Kept, tree, str(path), "set it in the file.")
    return kept.model_dump(mode="json", exclude_unset=True)
