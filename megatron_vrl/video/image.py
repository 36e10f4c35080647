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

from megatron_vrl.errors import CheckpointError, ConfigError, VideoError
from megatron_vrl.types import EncodedImage
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


def family_rules(pixels: PixelRules) -> ImageRules:
    """Return the pixel limits of a family's image processor."""
    return ImageRules(
        min_pixels=pixels.image_min_pixels, max_pixels=pixels.image_max_pixels, pixels=pixels
    )


def image_rules(
    hf_dir: str | Path, pixels: PixelRules, min_pixels: int | None, max_pixels: int | None
) -> ImageRules:
    """Return the rules of a run: `data.image_min_pixels` and `data.image_max_pixels`.

    None stands for the limit of the checkpoint's image processor. Raises CheckpointError as
    `read_image_rules` does, and ConfigError if the minimum is over the maximum.
    """
    rules = read_image_rules(hf_dir, pixels)
    least, most = min_pixels or rules.min_pixels, max_pixels or rules.max_pixels
    if least > most:
        raise ConfigError(
            f"data.image_min_pixels={least} is over data.image_max_pixels={most} (of the "
            "checkpoint where the configuration has none): lower it, or raise the other."
        )
    return ImageRules(min_pixels=least, max_pixels=most, pixels=pixels)


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
        return encode_image(path, path, rules)
    except VideoError as error:
        raise VideoError(f"{path} {error}", error.kind, path) from None


def encode_image(path: str, local: str, rules: ImageRules) -> EncodedImage:
    """Return the encoded image of the file `local`, a copy of `path`.

    Raises VideoError, whose message does not name the file.
    """
    from megatron_vrl.video.resize import resize  # imports torch

    try:
        content = Path(local).read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            picture = np.array(ImageOps.exif_transpose(file).convert("RGB"))  # [H, W, 3]
    except _BROKEN as error:
        raise _broken(error) from None
    height, width, _ = picture.shape
    size = _size(height, width, rules)
    return EncodedImage(
        path=path,
        digest=hashlib.blake2b(content, digest_size=16).hexdigest(),
        grid_thw=(1, size[0] // rules.pixels.patch, size[1] // rules.pixels.patch),
        frames=resize(picture[None], *size).repeat(2, axis=0),
    )


def image_tokens(local: str, rules: ImageRules) -> int:
    """Return the number of vision tokens of an image, from the file's header.

    Raises VideoError, whose message does not name the file.
    """
    try:
        with Image.open(local) as file:
            width, height = ImageOps.exif_transpose(file).size
    except _BROKEN as error:
        raise _broken(error) from None
    size = _size(height, width, rules)
    return size[0] * size[1] // rules.pixels.cell**2


def _size(height: int, width: int, rules: ImageRules) -> tuple[int, int]:
    """Return the height and width for the model. Raises VideoError for a thin image."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoError(f"is {width}x{height}, longer than {MAX_ASPECT}:1; crop it.")
    return smart_resize(height, width, rules.min_pixels, rules.max_pixels, rules.pixels.cell)


def _broken(error: BaseException) -> VideoError:
    """Return the VideoError for a file that PIL does not read."""
    reason = getattr(error, "strerror", None) or type(error).__name__
    return VideoError(f"cannot be read as an image ({reason}); replace it or leave it out.")
