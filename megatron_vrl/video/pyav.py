"""Reads video files with FFmpeg through PyAV: what is in a file, and chosen frames of it.

`probe` scans the packets without decoding and keeps the pts of every frame, so frame numbers and
times are right for variable frame rates and for headers that name no count. `PyavDecoder` seeks to
the keyframe before each wanted frame; where a container seeks badly it starts again and decodes in
order, so the frames are those of a sequential read either way.

Colours are converted as in DALI's CPU decoder, byte for byte: its swscale flags, and no heed
to colour tags (see `_RgbConverter`): chroma counts as centred, BT.709 is read as BT.601, rotation
is ignored. Left out: damage inside the compressed data is found only as far as FFmpeg reports it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.video.resize import resize
from megatron_vrl.video.rules import SamplingPlan

SWSCALE_FLAGS = 0x2 | 0x2000 | 0x40000  # BILINEAR | FULL_CHR_H_INT | ACCURATE_RND, as in DALI
UNTAGGED = "chroma_location=unspecified:colorspace=unknown:range=unspecified"
FRAMES_AT_A_TIME = 32  # full-size frames held before they are resized


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFile:
    """What the packets of a file's video stream say. N frames in order of presentation."""

    path: str
    codec: str
    stream: int  # index of the video stream that is read
    height: int  # pixels
    width: int
    native_fps: float  # frames per second, the average where the rate varies
    duration_s: float
    timestamps_s: NDArray[np.float64]  # [N] from the first frame's
    pts: NDArray[np.int64]  # [N] rising, in units of the stream
    keyframes: NDArray[np.int64]  # rising frame numbers one can seek to
    has_pts: bool  # False: only decoding times are known, frames are counted instead
    has_hidden_packets: bool  # packets that show no frame; decoders that count packets miscount

    @property
    def num_frames(self) -> int:
        return len(self.pts)

    def keyframe_before(self, index: int) -> int:
        """Number of the last keyframe at or before frame `index`; 0 if none is marked."""
        place = int(np.searchsorted(self.keyframes, index, side="right"))
        return int(self.keyframes[place - 1]) if place else 0


@dataclass(frozen=True, slots=True)
class DecodeJob:
    file: VideoFile
    plan: SamplingPlan


@dataclass(frozen=True, slots=True)
class _Packet:
    pts: int
    duration: int
    is_keyframe: bool


def probe(path: str) -> VideoFile:
    """Scan a file. Raises VideoError, whose message does not name the file."""
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError("has no video stream; give a file with pictures.")
            return _scan(path, container, stream)
    except av.FFmpegError as error:
        raise VideoError(f"cannot be opened as a video ({error.strerror}); replace it.") from None


def _scan(path: str, container: Any, stream: Any) -> VideoFile:
    codec = stream.codec.canonical_name
    packets: list[_Packet] = []
    has_pts, hidden, end_s = True, 0, 0.0
    for packet in container.demux():
        time = packet.dts if packet.pts is None else packet.pts
        if not packet.size or time is None:
            continue
        end_s = max(end_s, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        if packet.is_corrupt:
            raise VideoError(f"is cut off after {end_s:.2f} s; replace it.")
        if packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & 0x10):
            hidden += 1  # cut away by an edit list, or a VP8 reference frame that is never shown
            continue
        has_pts &= packet.pts is not None
        packets.append(_Packet(time, packet.duration or 0, packet.is_keyframe))
    if not packets:
        raise VideoError("has a video stream without frames; replace it.")
    file = _index(path, codec, stream, packets, has_pts, hidden)
    _check_complete(container, end_s, file)
    return file


def _index(
    path: str, codec: str, stream: Any, packets: list[_Packet], has_pts: bool, hidden: int
) -> VideoFile:
    packets = sorted(packets, key=lambda packet: packet.pts)
    pts, first = np.unique(np.array([packet.pts for packet in packets]), return_index=True)
    seconds = float(stream.time_base)
    timestamps_s = (pts - pts[0]) * seconds
    nominal_fps = float(stream.average_rate or 0)
    # Some containers leave out durations; the last frame then lasts as long as the others.
    last_s = packets[-1].duration * seconds
    if not last_s:
        last_s = timestamps_s[-1] / (len(pts) - 1) if len(pts) > 1 else 1 / (nominal_fps or 1)
    duration_s = float(timestamps_s[-1] + last_s)
    native_fps = len(pts) / duration_s
    # Where the header agrees it is exact, while times rounded to 1/1000 s would move the count
    # of sampled frames across a whole number.
    if abs(nominal_fps - native_fps) < 0.01 * native_fps:
        native_fps = nominal_fps
    return VideoFile(
        path=path,
        codec=codec,
        stream=stream.index,
        height=stream.height,
        width=stream.width,
        native_fps=native_fps,
        duration_s=duration_s,
        timestamps_s=timestamps_s,
        pts=pts,
        keyframes=np.flatnonzero([packets[i].is_keyframe for i in first]),
        has_pts=has_pts,
        has_hidden_packets=hidden > 0 or len(pts) < len(packets),
    )


def _check_complete(container: Any, end_s: float, file: VideoFile) -> None:
    """A container cut between two packets reads without an error; its header still knows."""
    if container.duration is None:
        return
    promised_s = (container.duration + max(container.start_time or 0, 0)) / av.time_base
    if promised_s - end_s > min(1.0, 0.1 * promised_s) + 1 / file.native_fps:
        raise VideoError(f"is cut off after {end_s:.2f} of {promised_s:.2f} s; replace it.")


class PyavDecoder:
    """Decodes on the CPU, `cfg.workers` videos at a time, one thread each."""

    def __init__(self, cfg: Video):
        if cfg.device != "cpu":
            raise ConfigError(
                f"video.device={cfg.device} needs video.decoder=dali; PyAV decodes on the CPU."
            )
        self._workers = cfg.workers

    def decode(self, jobs: Sequence[DecodeJob]) -> list[NDArray[np.uint8] | VideoError]:
        """[F, height, width, 3] at the plan's size for each job, or why not."""
        if len(jobs) < 2 or self._workers == 1:
            return [_decode_or_error(job) for job in jobs]
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(_decode_or_error, jobs))


def _decode_or_error(job: DecodeJob) -> NDArray[np.uint8] | VideoError:
    try:
        return decode_frames(job.file, job.plan)
    except VideoError as error:
        return error
    except (av.FFmpegError, OSError) as error:
        return VideoError(f"is damaged ({error.strerror}); replace it.")


def decode_frames(file: VideoFile, plan: SamplingPlan, seek: bool = True) -> NDArray[np.uint8]:
    """[F, height, width, 3] at the plan's size. Without `seek` every frame is decoded in order."""
    wanted, order = np.unique(plan.indices, return_inverse=True)
    seek = seek and file.has_pts
    pictures = _pictures(file, wanted.tolist(), seek)
    parts = []
    try:
        while chunk := list(islice(pictures, FRAMES_AT_A_TIME)):
            parts.append(resize(np.stack(chunk), plan.height, plan.width))
    except (_FrameMissing, av.FFmpegError) as error:
        if seek:
            return decode_frames(file, plan, seek=False)
        if isinstance(error, _FrameMissing):
            raise VideoError(f"has no picture at {error.time_s:.2f} s; replace it.") from None
        raise
    return np.concatenate(parts)[order]


class _FrameMissing(Exception):
    def __init__(self, time_s: float):
        self.time_s = time_s


def _pictures(file: VideoFile, wanted: list[int], seek: bool) -> Iterator[NDArray[np.uint8]]:
    """[H, W, 3] of each wanted frame; `wanted` rises."""
    to_rgb = _RgbConverter(file)
    with av.open(file.path) as container:
        stream: Any = container.streams[file.stream]
        stream.codec_context.thread_count = 1  # videos are the unit of parallel work
        frames = _numbered(container, stream, file)
        position = 0
        for index in wanted:
            keyframe = file.keyframe_before(index)
            if seek and position < keyframe:
                container.seek(int(file.pts[keyframe]), stream=stream)
                frames = _numbered(container, stream, file)
            number, frame = next((f for f in frames if f[0] >= index), (-1, None))
            if frame is None or number != index or frame.is_corrupt:
                raise _FrameMissing(float(file.timestamps_s[index]))
            position = index + 1
            yield to_rgb(frame)


def _numbered(container: Any, stream: Any, file: VideoFile) -> Iterator[tuple[int, Any]]:
    """Frames with their number, found by pts; -1 for frames the index does not know."""
    numbers = {pts: number for number, pts in enumerate(file.pts.tolist())}
    for count, frame in enumerate(container.decode(stream)):
        yield numbers.get(frame.pts, -1) if file.has_pts else count, frame


class _RgbConverter:
    """Converts the frames of one file.

    FFmpeg 8.1, inside PyAV since 17, obeys a frame's colour tags (chroma location, matrix, range),
    and PyAV cannot clear them; DALI's older FFmpeg ignores them. A filter that does nothing else
    clears them, without a copy.
    """

    def __init__(self, file: VideoFile):
        self._file = file
        self._reformat = VideoReformatter().reformat
        self._graph: av.filter.Graph | None = None

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        """[H, W, 3]"""
        if self._graph is None:
            self._graph = self._untag(frame)
        self._graph.push(frame)
        untagged: Any = self._graph.pull()
        rgb = self._reformat(
            untagged,
            self._file.width,
            self._file.height,
            "rgb24",
            interpolation=SWSCALE_FLAGS,
            threads=1,
        )
        return rgb.to_ndarray().astype(np.uint8, copy=False)

    @staticmethod
    def _untag(frame: Any) -> av.filter.Graph:
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=frame.time_base,
        )
        untag = graph.add("setparams", UNTAGGED)
        graph.link_nodes(source, untag, graph.add("buffersink")).configure()
        return graph
