"""Images: files in, EncodedImage out, by the rules of the checkpoint's own image processor.

Resized like every frame (`video/resize.py`) between the processor's fewest and most pixels and
shown twice, as one temporal step. As transformers' `load_image` does: the EXIF orientation is
applied, and whatever is not RGB is converted by PIL, so transparency is dropped. Left out: a side
under 15 px keeps one cell as in `rules.smart_resize`, where transformers enlarges the image.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from megatron_vrl.errors import CheckpointError, VideoError
from megatron_vrl.types import EncodedImage
from megatron_vrl.video.resize import resize
from megatron_vrl.video.rules import MAX_ASPECT, PATCH, smart_resize

_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # of a bad file


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """Of Qwen2VLImageProcessor, where a checkpoint says nothing else."""

    min_pixels: int = 56 * 56
    max_pixels: int = 14 * 14 * 4 * 1280


def read_image_rules(hf_dir: str | Path) -> ImageRules:
    """Return the limits of a checkpoint's image processor, from the file that transformers reads.

    That is `image_processor` of processor_config.json, else preprocessor_config.json. What neither
    says is left at the default. Raises CheckpointError if a file cannot be read.
    """
    directory = Path(hf_dir)
    nested, own = directory / "processor_config.json", directory / "preprocessor_config.json"
    found = _json(nested).get("image_processor")
    found = _json(own) if found is None else _object(found, nested, "image_processor")
    size = _object(found.get("size"), own, "size")
    rules = ImageRules()
    fewest = found.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = found.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    return ImageRules(min_pixels=fewest or rules.min_pixels, max_pixels=most or rules.max_pixels)


def _json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        return _object(json.loads(file.read_text()), file, "the file")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): restore it from the checkpoint."
        ) from None


def _object(value: Any, file: Path, what: str) -> dict[str, Any]:
    """Return `value`, {} for null. Raises CheckpointError if it is no object."""
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(
            f"{file} cannot be read ({what} is {value!r:.40}, not an object): restore it from the "
            "checkpoint."
        )
    return value or {}


def read_image(path: str, rules: ImageRules) -> EncodedImage:
    """Raises VideoError, naming the file, if it is missing, damaged or longer than 200:1."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            picture = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))  # [H, W, 3]
    except _BROKEN as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoError(
            f"{path} cannot be read as an image ({reason}); replace it or leave it out."
        ) from None
    height, width, _ = picture.shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoError(f"{path} is {width}x{height}, longer than {MAX_ASPECT}:1; crop it.")
    size = smart_resize(height, width, rules.min_pixels, rules.max_pixels)
    return EncodedImage(
        path=path,
        digest=hashlib.blake2b(content, digest_size=16).hexdigest(),
        grid_thw=(1, size[0] // PATCH, size[1] // PATCH),
        frames=resize(picture[None], *size).repeat(2, axis=0),
    )
