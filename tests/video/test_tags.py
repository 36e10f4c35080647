"""Colour and rotation tags: both decoders equal the arithmetic of the standards."""

from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest

from megatron_vrl.config import Video
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import EncodedVideo, VideoClip
from megatron_vrl.video.colour import correct_matrix, to_rgb
from megatron_vrl.video.encode import Encoder
from megatron_vrl.video.probe import probe
from megatron_vrl.video.routing import dali_reads
from tests.video.conftest import MakeClip

SIDE = 56
# (Y, Cb, Cr) that no matrix below takes out of RGB's cube
YCBCR = np.array([(110, 90, 160), (128, 128, 128), (100, 150, 100), (150, 105, 150)], np.uint8)
BT709, UNTAGGED, BT601, BT2020 = 1, 2, 6, 9
LIMITED, FULL = 1, 2


def encode(decoder: Literal["dali", "pyav"], path: str, **rule: Any) -> EncodedVideo:
    encoder = Encoder(Video(decoder=decoder, **{"min_pixels": 784, **rule}), PIXELS)
    clip = VideoClip(path)
    (video,) = encoder.encode([clip], [encoder.identify(clip, None).digest])
    assert isinstance(video, EncodedVideo), video
    return video


def write_patches(path: str, codec: str, matrix: int, colour_range: int, depth: int) -> None:
    """Write four flat frames, one per row of YCBCR, losslessly."""
    pixels = "yuv444p" if depth == 8 else "yuv444p10le"
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=4)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.gop_size = pixels, 1
        stream.options = {"qp": "0"} if codec == "libx264" else {"lossless": "1"}
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = colour_range
        for colour in YCBCR:
            planes = np.full((SIDE, SIDE, 3), colour).transpose(2, 0, 1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")
            frame.colorspace, frame.color_range = matrix, colour_range
            frame = frame.reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rgb(matrix: int, is_full: bool) -> np.ndarray:
    """Return the RGB [4, 3] of YCBCR by the definition."""
    values = YCBCR.astype(float) - [0 if is_full else 16, 128, 128]
    scale = [1, 1, 1] if is_full else [255 / 219, 255 / 224, 255 / 224]
    return (values * scale) @ to_rgb(matrix).T


@pytest.mark.parametrize("matrix", [BT709, BT601, BT2020, UNTAGGED])
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
@pytest.mark.parametrize(("codec", "depth"), [("libx264", 8), ("libx264", 10), ("libvpx-vp9", 8)])
def test_colours_follow_the_tags(
    tmp_path: Path, codec: str, depth: int, matrix: int, colour_range: int
) -> None:
    path = str(tmp_path / ("clip.mp4" if codec == "libx264" else "clip.webm"))
    write_patches(path, codec, matrix, colour_range, depth)
    file = probe(path)
    assert (file.matrix, file.colour_range == FULL) == (matrix, colour_range == FULL)
    video = encode("pyav", path, fps=4.0)
    want = rgb(matrix, colour_range == FULL)
    found = video.frames[:, SIDE // 2, SIDE // 2].astype(float)
    assert np.abs(found - want).max() < 2
    np.testing.assert_array_equal(encode("dali", path, fps=4.0).frames, video.frames)


def test_matrices_equal_the_standards() -> None:
    """Compare with the rounded coefficients of ITU-R BT.601-7 and BT.709-6."""
    np.testing.assert_allclose(to_rgb(BT601)[0], [1, 0, 1.402], atol=1e-3)
    np.testing.assert_allclose(to_rgb(BT601)[1], [1, -0.344, -0.714], atol=1e-3)
    np.testing.assert_allclose(to_rgb(BT709)[1], [1, -0.187, -0.468], atol=1e-3)
    np.testing.assert_allclose(to_rgb(BT709)[2], [1, 1.856, 0], atol=1e-3)


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("matrix", [BT709, BT2020])
def test_a_wrong_matrix_is_corrected(matrix: int, is_full: bool) -> None:
    read = np.rint(rgb(BT601, is_full)).astype(np.uint8)
    assert np.abs(correct_matrix(read, matrix) - rgb(matrix, is_full)).max() < 2
    assert np.abs(read - rgb(matrix, is_full)).max() > 4


@pytest.mark.parametrize("degrees", [90, 180, -90])
@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_frames_are_rotated_by_the_display_matrix(
    make_clip: MakeClip, decoder: Literal["dali", "pyav"], degrees: int
) -> None:
    size = {"size": (112, 168), "num_frames": 16}
    upright = encode("pyav", make_clip("upright.mp4", **size), num_frames=4)
    path = make_clip("turned.mp4", turned=degrees, **size)
    video = encode(decoder, path, num_frames=4)
    assert dali_reads(probe(path), "cpu")
    want = np.rot90(upright.frames, degrees // 90, axes=(1, 2))  # numpy, too, turns to the left
    np.testing.assert_array_equal(video.frames, want)
    assert video.grid_thw[1:] == ((12, 8) if degrees % 180 else (8, 12))


def test_both_decoders_rotate_before_resizing(make_clip: MakeClip) -> None:
    path = make_clip("turned.mp4", turned=90, size=(240, 320), num_frames=16)
    small = {"max_pixels": 100 * 100, "num_frames": 4}
    np.testing.assert_array_equal(
        encode("dali", path, **small).frames, encode("pyav", path, **small).frames
    )


def test_colour_tags_decide_the_decoder(make_clip: MakeClip) -> None:
    tagged = {"bt709.mp4": (BT709, LIMITED), "bt601.mp4": (BT601, LIMITED)}
    routes = {
        name: dali_reads(probe(make_clip(name, colours=colours, num_frames=8)), "cpu")
        for name, colours in tagged.items()
    }
    assert routes == {"bt709.mp4": False, "bt601.mp4": True}


def test_codecs_that_each_gpu_generation_decodes(make_clip: MakeClip) -> None:
    ten_bits = probe(make_clip("clip.mp4", pixels="yuv420p10le", num_frames=4))
    plain = probe(make_clip("plain.mp4", colours=(BT709, LIMITED), num_frames=4))
    hopper, blackwell = (9, 0), (10, 0)
    assert dali_reads(plain, "gpu", hopper)
    assert not dali_reads(ten_bits, "gpu", hopper)
    assert dali_reads(ten_bits, "gpu", blackwell)
    assert dali_reads(ten_bits, "cpu")
