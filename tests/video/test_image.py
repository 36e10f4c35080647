"""Images compared with transformers' image processor: equal grid, patches near equal."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_vrl.config import Video
from megatron_vrl.errors import CheckpointError, ConfigError, VideoError
from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops
from megatron_vrl.types import EncodedImage, EncodedVideo, ImageFile, VideoClip
from megatron_vrl.video import VideoReader
from megatron_vrl.video.image import ImageRules, image_rules, read_image, read_image_rules
from megatron_vrl.video.rules import smart_resize
from tests.video.conftest import MakeClip

declare_missing_ops()

from transformers.image_utils import load_image  # noqa: E402
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as published  # noqa: E402

RULES = ImageRules(
    min_pixels=PIXELS.image_min_pixels, max_pixels=PIXELS.image_max_pixels, pixels=PIXELS
)
GREY_LEVEL = 1 / 255 / 0.26  # one grey level after normalisation


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return smooth colours with noise, which a wrong resize would change."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    smooth = np.stack([y, x, 1 - y], -1) * 200
    return (smooth + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    def save(pixels: npt.NDArray[np.uint8], name: str = "image.png", **options: Any) -> str:
        Image.fromarray(pixels).save(tmp_path / name, **options)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize(
    ("height", "width"), [(56, 84), (100, 75), (333, 517), (20, 30), (1500, 1100), (30, 900)]
)
def test_grid_and_patches_equal_transformers(
    saved: Callable[..., str], height: int, width: int
) -> None:
    path = saved(picture(height, width))
    image = read_image(path, RULES)
    oracle = published.Qwen2VLImageProcessorPil()(load_image(path), return_tensors="np")
    assert oracle["image_grid_thw"].tolist() == [list(image.grid_thw)]
    gap = np.abs(patchify(image.frames, PIXELS).numpy() - oracle["pixel_values"])
    assert gap.max() < 1.01 * GREY_LEVEL  # of two bicubic resizes that round to bytes
    assert (gap > 0.5 * GREY_LEVEL).mean() < 0.02


@given(st.integers(15, 3000), st.integers(15, 3000))
def test_sizes_equal_transformers(height: int, width: int) -> None:
    if max(height, width) <= 200 * min(height, width):
        limits = {"min_pixels": RULES.min_pixels, "max_pixels": RULES.max_pixels}
        assert smart_resize(height, width, **limits, cell=PIXELS.cell) == published.smart_resize(
            height, width, factor=28, **limits
        )


def test_orientation_and_colours_are_those_of_load_image(saved: Callable[..., str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    for path in (
        saved(picture(84, 140), "turned.jpg", exif=exif),
        saved(picture(84, 140)[..., 0], "grey.png"),
        saved(np.dstack([picture(84, 140), picture(84, 140)[..., :1]]), "transparent.png"),
    ):
        wanted = np.asarray(load_image(path))
        image = read_image(path, RULES)
        assert image.frames.shape == (2, *wanted.shape)  # no resize: already multiples of 28
        assert all(np.array_equal(frame, wanted) for frame in image.frames)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", {"min_pixels": 784, "max_pixels": 1568}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 1568}}),
        (
            "processor_config.json",
            {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 1568}}},
        ),
    ],
)
def test_limits_of_the_checkpoint(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    assert read_image_rules(tmp_path, PIXELS) == ImageRules(
        min_pixels=3136, max_pixels=1003520, pixels=PIXELS
    )
    (tmp_path / name).write_text(json.dumps(content))
    assert read_image_rules(tmp_path, PIXELS) == ImageRules(
        min_pixels=784, max_pixels=1568, pixels=PIXELS
    )
    for broken in ("{", "[]", '{"image_processor": 7, "size": 784}'):
        (tmp_path / name).write_text(broken)
        with pytest.raises(CheckpointError, match="restore it from the checkpoint"):
            read_image_rules(tmp_path, PIXELS)


def test_bad_files_are_named(saved: Callable[..., str], tmp_path: Path) -> None:
    whole = saved(picture(100, 100))
    (tmp_path / "torn.png").write_bytes(Path(whole).read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    for name in ("torn.png", "text.png", "absent.png"):
        with pytest.raises(VideoError, match=f"{name} cannot be read as an image"):
            read_image(str(tmp_path / name), RULES)
    with pytest.raises(VideoError, match="is 900x4, longer than 200:1; crop it"):
        read_image(saved(picture(4, 900), "thin.png"), RULES)


def test_a_reader_keeps_the_order_of_clips_and_images(
    saved: Callable[..., str], make_clip: MakeClip, tmp_path: Path
) -> None:
    clip, path = VideoClip(make_clip("a.mp4", num_frames=16)), saved(picture(100, 75))
    rules = replace(RULES, max_pixels=64 * 64)
    sampling = {"decoder": "pyav", "workers": 1, "retries": 0, "min_pixels": 784}
    reader = VideoReader(Video.model_validate(sampling), PIXELS, rules)
    good, copy = ImageFile(path), ImageFile(saved(picture(100, 75), "copy.png"))
    absent, outside = ImageFile(str(tmp_path / "no.png")), ImageFile(path, str(tmp_path / "in"))
    shown, image, missing, other, again, bad = reader.read(
        [clip, good, absent, clip, copy, outside]
    )
    assert isinstance(shown, EncodedVideo) and isinstance(other, EncodedVideo)
    wanted = read_image(path, rules)
    assert isinstance(image, EncodedImage) and isinstance(again, EncodedImage)
    assert (image.path, image.digest, image.grid_thw) == (path, wanted.digest, wanted.grid_thw)
    assert np.array_equal(image.frames, wanted.frames) and again.path == copy.path
    assert isinstance(missing, VideoError) and (missing.kind, missing.path) == (
        "missing",
        absent.path,
    )
    assert isinstance(bad, VideoError) and bad.kind == "outside"
    assert reader.counts == {"decoded": 2, "failed": 2, "store": 0, "retried": 0}
    reader.prefetch([good, clip])
    assert isinstance(reader.read([good])[0], EncodedImage) and reader.counts["store"] == 2
    tokens, error = reader.count_tokens([good, absent])
    assert tokens == wanted.grid_thw[1] * wanted.grid_thw[2] // 4
    assert (
        str(error) == f"{absent.path} cannot be read (No such file or directory); check the path."
    )


def test_limits_of_a_run_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    assert image_rules(tmp_path, PIXELS, None, None) == RULES
    assert image_rules(tmp_path, PIXELS, 784, 7840) == replace(
        RULES, min_pixels=784, max_pixels=7840
    )
    with pytest.raises(
        ConfigError, match=r"image_min_pixels=3136 is over data\.image_max_pixels=784"
    ):
        image_rules(tmp_path, PIXELS, None, 784)
