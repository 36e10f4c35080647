"""PyavDecoder: decodes selected frames with FFmpeg (through PyAV) on the CPU.

For each requested frame, the decoder seeks to the keyframe before it. If a container seeks
incorrectly, decoding starts again from the beginning without seeking, so the frames are always
those of a sequential read. Between the keyframe and the requested frame, non-reference frames are
skipped (about half of the frames of a typical H.264 file).

Colours and rotation follow the file's tags (`video/colour.py`), except that chroma is always
treated as centred. swscale runs with DALI's flags. So the frames are byte-equal to those of DALI's
CPU decoder. Damage inside compressed data is detected only as far as FFmpeg reports it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.video.faults import as_video_error
from megatron_vrl.video.probe import DecodeJob, VideoFile, open_video
from megatron_vrl.video.resize import resize, rotate
from megatron_vrl.video.rules import SamplingPlan
from megatron_vrl.video.scan import JOINABLE

SWSCALE_FLAGS = 0x2 | 0x2000 | 0x40000  # BILINEAR | FULL_CHR_H_INT | ACCURATE_RND, as in DALI
FRAMES_AT_A_TIME = 32  # full-size frames in memory before they are resized
SKIPPING = {"h264", "hevc"}  # codecs whose FFmpeg decoder can skip non-reference frames


class PyavDecoder:
    """Decodes `cfg.workers` videos in parallel, one thread per video."""

    def __init__(self, cfg: Video):
        if cfg.device != "cpu":
            raise ConfigError(
                f"video.device={cfg.device} needs video.decoder=dali; PyAV decodes on the CPU."
            )
        self._workers = cfg.workers

    def decode(self, jobs: Sequence[DecodeJob]) -> list[NDArray[np.uint8] | VideoError]:
        """Return frames [F, height, width, 3] of each job at its plan's size, or the error."""
        if len(jobs) < 2 or self._workers == 1:
            return [_decode_or_error(job) for job in jobs]
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(_decode_or_error, jobs))


def _decode_or_error(job: DecodeJob) -> NDArray[np.uint8] | VideoError:
    """Return the frames of a job, or its VideoError instead of raising it."""
    try:
        with as_video_error("is damaged", "damaged"):
            return decode_frames(job.file, job.plan)
    except VideoError as error:
        return error


def decode_frames(file: VideoFile, plan: SamplingPlan, seek: bool = True) -> NDArray[np.uint8]:
    """Return frames [F, height, width, 3] at the size of the plan.

    With `seek` False every frame up to the last requested one is decoded in order.
    """
    wanted, order = np.unique(plan.indices, return_inverse=True)
    seek = seek and file.has_pts
    pictures = _pictures(file, wanted.tolist(), seek)
    parts = []
    try:
        while chunk := list(islice(pictures, FRAMES_AT_A_TIME)):
            shown = rotate(np.stack(chunk), file.quarter_turns)
            parts.append(resize(shown, plan.height, plan.width))
    except (_FrameMissing, av.FFmpegError) as error:
        if seek:
            return decode_frames(file, plan, seek=False)
        if isinstance(error, _FrameMissing):
            raise VideoError(f"has no picture at {error.time_s:.2f} s; replace it.") from None
        raise
    return np.concatenate(parts)[order]


class _FrameMissing(Exception):
    """A requested frame was not decoded."""

    def __init__(self, time_s: float):
        self.time_s = time_s


def _pictures(file: VideoFile, wanted: list[int], seek: bool) -> Iterator[NDArray[np.uint8]]:
    """Yield each requested frame [H, W, 3] at coded size. `wanted` is ascending."""
    to_rgb = _RgbConverter(file)
    skips = {int(file.pts[i]) for i in wanted} if seek and file.codec in SKIPPING else None
    with open_video(file.path) as container:
        stream: Any = container.streams[file.stream]
        stream.codec_context.thread_count = 1  # parallelism is over videos, not inside one
        frames = _numbered(container, stream, file, skips)
        position = 0
        for index in wanted:
            keyframe = file.keyframe_before(index)
            if seek and position < keyframe:
                container.seek(int(file.pts[keyframe]), stream=stream)
                frames = _numbered(container, stream, file, skips)
            number, frame = next((f for f in frames if f[0] >= index), (-1, None))
            if frame is None or number != index or frame.is_corrupt:
                raise _FrameMissing(float(file.timestamps_s[index]))
            position = index + 1
            yield to_rgb(frame)


def _numbered(
    container: Any, stream: Any, file: VideoFile, skip_all_but: set[int] | None
) -> Iterator[tuple[int, Any]]:
    """Yield (frame number, frame), with the number found by pts; -1 for an unknown pts.

    Of the non-reference frames, only those with a pts in `skip_all_but` are decoded.
    """
    numbers = {pts: number for number, pts in enumerate(file.pts.tolist())}
    count, is_decodable = 0, not len(file.keyframes)
    for packet in container.demux(stream):
        is_decodable |= packet.is_keyframe or not packet.size
        if not is_decodable:
            continue  # the file begins inside a group of pictures (GOP)
        if container.format.name in JOINABLE:
            packet.is_corrupt = False  # set by the demuxer at a joint; the decoder's flag is kept
        if skip_all_but is not None:
            wanted = packet.pts is None or packet.pts in skip_all_but
            stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
        for frame in packet.decode():
            yield numbers.get(frame.pts, -1) if file.has_pts else count, frame
            count += 1


class _RgbConverter:
    """Converts the frames of one file to RGB by the file's matrix and range.

    FFmpeg 8.1 (PyAV 17 and later) also applies the chroma location tag; DALI's older FFmpeg does
    not, and PyAV cannot clear the tag. A setparams filter clears it without a copy.
    """

    def __init__(self, file: VideoFile):
        self._height, self._width = file.coded_size
        self._reformat = VideoReformatter().reformat
        self._graph: av.filter.Graph | None = None

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        """Return the frame as RGB [H, W, 3]."""
        if self._graph is None:
            self._graph = self._centre_chroma(frame)
        self._graph.push(frame)
        centred: Any = self._graph.pull()
        rgb = self._reformat(
            centred,
            self._width,
            self._height,
            "rgb24",
            interpolation=SWSCALE_FLAGS,
            threads=1,
        )
        return rgb.to_ndarray().astype(np.uint8, copy=False)

    @staticmethod
    def _centre_chroma(frame: Any) -> av.filter.Graph:
        """Return the filter graph that clears the chroma location tag."""
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=frame.time_base,
        )
        centre = graph.add("setparams", "chroma_location=unspecified")
        graph.link_nodes(source, centre, graph.add("buffersink")).configure()
        return graph
