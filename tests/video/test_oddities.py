"""Containers x codecs x oddities: both decoders give the bytes of a plain read by PyAV."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from megatron_vrl.config import Video
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import EncodedVideo, VideoClip
from megatron_vrl.video.encode import Encoder
from megatron_vrl.video.probe import probe
from megatron_vrl.video.pyav import SWSCALE_FLAGS
from megatron_vrl.video.resize import resize, rotate
from tests.video.oddities import IMPOSSIBLE, MATRIX, ODDITIES, ONLY

RULE: dict[str, Any] = {"min_pixels": 28 * 28, "max_pixels": 56 * 56, "fps": 4.0}


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    return {name: Encoder(Video(decoder=name, **RULE), PIXELS) for name in ("dali", "pyav")}


def plain_read(path: str) -> list[np.ndarray]:
    """Yield each frame [H, W, 3] from the first keyframe on, at the size in the file's header."""
    frames = []
    with av.open(path) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        height, width = stream.height, stream.width
        is_decodable = False
        for packet in container.demux(stream):
            is_decodable |= packet.is_keyframe or not packet.size
            for frame in packet.decode() if is_decodable else ():
                assert isinstance(frame, av.VideoFrame)
                rgb = with_centred_chroma(frame).reformat(
                    width, height, "rgb24", interpolation=SWSCALE_FLAGS, threads=1
                )
                frames.append(rgb.to_ndarray())
    return frames


def with_centred_chroma(frame: av.VideoFrame) -> av.VideoFrame:
    """Return the frame without its chroma location tag."""
    graph = av.filter.Graph()
    centre = graph.add("setparams", "chroma_location=unspecified")
    graph.link_nodes(
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        ),
        centre,
        graph.add("buffersink"),
    ).configure()
    graph.push(frame)
    pulled = graph.pull()
    assert isinstance(pulled, av.VideoFrame)
    return pulled


def cases() -> list[tuple[str, str, str]]:
    return [
        (container, codec, oddity)
        for container, codec in MATRIX
        for oddity in ODDITIES
        if codec in ONLY.get(oddity, {codec}) and (container, oddity) not in IMPOSSIBLE
    ]


@pytest.mark.parametrize(
    "container",
    [
        name if name == "mp4" else pytest.param(name, marks=pytest.mark.slow)
        for name in dict(MATRIX)
    ],
)
def test_decoders_give_the_bytes_of_a_plain_read(
    encoders: dict[str, Encoder], tmp_path: Path, container: str
) -> None:
    wrong: list[tuple[object, ...]] = []
    for _, codec, oddity in (case for case in cases() if case[0] == container):
        path = str(tmp_path / f"{oddity}_{codec}.{container}")
        ODDITIES[oddity](path, codec)
        given = {
            name: encoder.encode([VideoClip(path)], ["digest"])[0]
            for name, encoder in encoders.items()
        }
        videos = {name: one for name, one in given.items() if isinstance(one, EncodedVideo)}
        if len(videos) < len(given):
            wrong.append((codec, oddity, *map(str, given.values())))
            continue
        file, shown = probe(path), plain_read(path)
        if len(shown) != file.num_frames:
            wrong.append((codec, oddity, "plain", len(shown), "ours", file.num_frames))
            continue
        video = videos["pyav"]
        height, width = (14 * side for side in video.grid_thw[1:])
        chosen = np.stack([shown[i] for i in video.frame_indices])
        want = resize(rotate(chosen, file.quarter_turns), height, width)
        for name in videos:
            if not np.array_equal(videos[name].frames, want):
                wrong.append((codec, oddity, name, int((videos[name].frames != want).sum())))
    assert not wrong, "\n".join(map(str, wrong))
