"""DaliDecoder: decodes with NVIDIA DALI, on the CPU or on the GPU with NVDEC.

This is the only module that imports nvidia.dali. One pipeline is reused for all batches. A run of
the pipeline takes several parts, of one or more files, and a list of frame numbers per part. A part
is a file in memory that has only the packets that its frames depend on (`video/trim.py`), because
DALI decodes every frame up to the last one requested.

On the CPU, frames leave DALI at full size and are resized by `video/resize.py`, so they are
byte-equal to PyAV's. On the GPU, DALI resizes too (within 1 grey level of `video/resize.py`), so
only small frames are copied to the host, where the colour matrix is corrected. DALI ignores
rotation tags, so frames are rotated last.

Each job is decoded in one of two ways:

  DALI       `routing.dali_reads` accepts the file, `trim.split` cuts it into parts, and the
             full-size frames of each part fit MAX_BATCH_BYTES
  FALLBACK   all other files, and files that DALI fails on: PyAV decodes them or returns the error

If one part makes DALI fail, the whole batch fails, and DALI does not name the part. The batch is
then halved until the part is alone. Example: part 3 of 4 is damaged.

  1, 2, 3, 4   fails, so it is halved
  1, 2         decoded
  3, 4         fails, so it is halved
  3            fails, so PyAV takes its file; `num_fallbacks` grows by 1
  4            decoded
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.video.colour import correct_matrix
from megatron_vrl.video.probe import DecodeJob
from megatron_vrl.video.pyav import PyavDecoder
from megatron_vrl.video.resize import resize, rotate
from megatron_vrl.video.routing import dali_reads
from megatron_vrl.video.trim import Part, split

try:
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType, DALIInterpType
except ModuleNotFoundError:
    raise ConfigError(
        "video.decoder=dali needs nvidia.dali, which is not installed; install "
        "megatron_vrl[cpu] or megatron_vrl[gpu], or set video.decoder=pyav."
    ) from None

MAX_BATCH = 32  # parts per pipeline run
MAX_BATCH_BYTES = 1 << 30  # full-size frames per pipeline run


class _Task(NamedTuple):
    """One part of a job."""

    job: DecodeJob
    part: Part

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the part's frames before resizing."""
        return len(self.part.frames) * self.job.file.height * self.job.file.width * 3


class DaliDecoder:
    """Decoder on the GPU torch.cuda.current_device() or on the CPU.

    Each rank sets its device first.
    """

    def __init__(self, cfg: Video):
        if cfg.device == "gpu" and not torch.cuda.is_available():
            raise ConfigError("video.device=gpu, but torch sees no GPU; set video.device=cpu.")
        self._cfg = cfg
        self._capability = torch.cuda.get_device_capability() if cfg.device == "gpu" else (0, 0)
        self._pyav = PyavDecoder(cfg.model_copy(update={"device": "cpu"}))
        self._pipeline = self._build()
        self.num_fallbacks = 0

    def decode(self, jobs: Sequence[DecodeJob]) -> list[NDArray[np.uint8] | VideoError]:
        """Return frames [F, height, width, 3] of each job at its plan's size, or the error."""
        results = self._decode_own(jobs)
        rest = [i for i, frames in enumerate(results) if frames is None]
        self.num_fallbacks += len(rest)
        second = iter(self._pyav.decode([jobs[i] for i in rest]))
        return [next(second) if frames is None else frames for frames in results]

    def _decode_own(self, jobs: Sequence[DecodeJob]) -> list[NDArray[np.uint8] | None]:
        """Return the frames of each job, None where DALI cannot read the file or fails on it."""
        if len(jobs) < 2:
            parts = [self._parts(job) for job in jobs]
        else:
            with ThreadPoolExecutor(self._cfg.workers) as pool:
                parts = list(pool.map(self._parts, jobs))
        tasks = [_Task(job, part) for job, of in zip(jobs, parts, strict=True) for part in of]
        decoded = iter([f for batch in _batches(tasks) for f in self._run_or_halve(batch)])
        return [
            _join(job, of, [next(decoded) for _ in of]) for job, of in zip(jobs, parts, strict=True)
        ]

    def _parts(self, job: DecodeJob) -> list[Part]:
        """Return what DALI decodes of a job; [] if DALI cannot read the file."""
        if not dali_reads(job.file, self._cfg.device, self._capability):
            return []
        try:
            parts = split(job)
        except (av.FFmpegError, OSError, ValueError):  # PyAV reports it
            return []
        fits = all(_Task(job, part).num_bytes <= MAX_BATCH_BYTES for part in parts)
        return parts if fits else []

    def _run_or_halve(self, tasks: list[_Task]) -> list[NDArray[np.uint8] | None]:
        """Decode one batch. If it fails, decode its halves."""
        try:
            return list(self._run(tasks))
        except RuntimeError:
            self._pipeline = self._build()  # a failed pipeline cannot run again
        if len(tasks) == 1:
            return [None]
        half = len(tasks) // 2
        return self._run_or_halve(tasks[:half]) + self._run_or_halve(tasks[half:])

    def _run(self, tasks: list[_Task]) -> list[NDArray[np.uint8]]:
        """Run the pipeline once. Return the finished frames of each part."""
        feed = {
            "encoded": [task.part.encoded for task in tasks],
            "wanted": [task.part.positions for task in tasks],
        }
        if self._cfg.device == "gpu":
            feed["size"] = [np.array(_size_before_rotation(job), np.float32) for job, _ in tasks]
        (decoded,) = self._pipeline.run(**feed)
        decoded = decoded.as_cpu()
        return [self._finish(task.job, decoded.at(i)) for i, task in enumerate(tasks)]

    def _finish(self, job: DecodeJob, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the frames with corrected colours, rotated and resized."""
        if self._cfg.device == "gpu":
            frames = correct_matrix(frames, job.file.matrix)
        shown = rotate(frames, job.file.quarter_turns)
        return resize(shown, job.plan.height, job.plan.width)

    def _build(self) -> Pipeline:
        """Return a new pipeline."""
        on_gpu = self._cfg.device == "gpu"
        pipeline = Pipeline(
            batch_size=MAX_BATCH,
            num_threads=self._cfg.workers,
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=1,  # errors are raised by the run that caused them
            exec_dynamic=True,
        )
        with pipeline:
            pipeline.set_outputs(_graph(on_gpu))
        pipeline.build()
        return pipeline


def _graph(on_gpu: bool) -> Any:
    """Return the output node of the pipeline: decode, and on the GPU also resize."""
    encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
    wanted = fn.external_source(name="wanted", dtype=DALIDataType.INT32, ndim=1)
    frames = fn.decoders.video(encoded, frames=wanted, device="mixed" if on_gpu else "cpu")
    if not on_gpu:
        return frames
    size = fn.external_source(name="size", dtype=DALIDataType.FLOAT, ndim=1)
    cubic = DALIInterpType.INTERP_CUBIC
    return fn.resize(frames, size=size, interp_type=cubic, antialias=True)


def _size_before_rotation(job: DecodeJob) -> tuple[int, int]:
    """Return the (height, width) that DALI resizes to."""
    size = (job.plan.height, job.plan.width)
    return size[::-1] if job.file.quarter_turns % 2 else size


def _join(
    job: DecodeJob, parts: list[Part], decoded: list[NDArray[np.uint8] | None]
) -> NDArray[np.uint8] | None:
    """Return the frames of a job in the order of its plan; None without all of its parts."""
    found = [frames for frames in decoded if frames is not None]
    if not parts or len(found) < len(parts):
        return None
    numbers = np.concatenate([part.frames for part in parts])
    order = np.argsort(numbers)
    return np.concatenate(found)[order[np.searchsorted(numbers[order], job.plan.indices)]]


def _batches(tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
    """Yield batches within MAX_BATCH and MAX_BATCH_BYTES, in order."""
    batch: list[_Task] = []
    room = MAX_BATCH_BYTES
    for task in tasks:
        if batch and (len(batch) == MAX_BATCH or task.num_bytes > room):
            yield batch
            batch, room = [], MAX_BATCH_BYTES
        batch.append(task)
        room -= task.num_bytes
    if batch:
        yield batch
