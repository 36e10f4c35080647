"""Reads images to EncodedImage by the rules of the checkpoint's image processor.

An image is resized like a video frame (`video/resize.py`), to a size between the processor's
minimum and maximum pixels, and repeated once to make one temporal step. As in transformers'
`load_image`, the EXIF orientation is applied and other modes are converted to RGB by PIL, which
drops transparency. One difference: a side that rounds to no cell is resized to one cell
(`rules.smart_resize`), while transformers enlarges the whole image.
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
from megatron_vrl.video.rules import MAX_ASPECT, PixelRules, smart_resize

_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # raised by PIL for a bad file


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """Pixel limits of a checkpoint, and the patches of its family."""

    min_pixels: int
    max_pixels: int
    pixels: PixelRules


def read_image_rules(hf_dir: str | Path, pixels: PixelRules) -> ImageRules:
    """Return the pixel limits of a checkpoint's image processor, as transformers reads them.

    The file is `image_processor` in processor_config.json, else preprocessor_config.json. Missing
    values get the family's default. Raises CheckpointError if a file cannot be read.
    """
    directory = Path(hf_dir)
    nested, own = directory / "processor_config.json", directory / "preprocessor_config.json"
    found = _json(nested).get("image_processor")
    found = _json(own) if found is None else _object(found, nested, "image_processor")
    size = _object(found.get("size"), own, "size")
    fewest = found.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = found.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    return ImageRules(
        min_pixels=fewest or pixels.image_min_pixels,
        max_pixels=most or pixels.image_max_pixels,
        pixels=pixels,
    )


def _json(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file; {} if there is no file."""
    if not file.is_file():
        return {}
    try:
        return _object(json.loads(file.read_text()), file, "the file")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): restore it from the checkpoint."
        ) from None


def _object(value: Any, file: Path, what: str) -> dict[str, Any]:
    """Return `value`, or {} for null. Raises CheckpointError if it is not an object."""
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(
            f"{file} cannot be read ({what} is {value!r:.40}, not an object): restore it from the "
            "checkpoint."
        )
    return value or {}


def read_image(path: str, rules: ImageRules) -> EncodedImage:
    """Return the encoded image.

    Raises VideoError naming the file if it is missing, damaged or over 200:1.
    """
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
    size = smart_resize(height, width, rules.min_pixels, rules.max_pixels, rules.pixels.cell)
    return EncodedImage(
        path=path,
        digest=hashlib.blake2b(content, digest_size=16).hexdigest(),
        grid_thw=(1, size[0] // rules.pixels.patch, size[1] // rules.pixels.patch),
        frames=resize(picture[None], *size).repeat(2, axis=0),
    )
