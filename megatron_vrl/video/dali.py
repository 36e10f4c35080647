"""DaliDecoder: decodes with NVIDIA DALI, on the CPU or on the GPU with NVDEC.

This is the only module that imports nvidia.dali. One pipeline is reused for all batches. A run of
the pipeline takes the bytes of several files and a list of frame numbers per file.

On the CPU, frames leave DALI at full size and are resized by `video/resize.py`, so they are
byte-equal to PyAV's. On the GPU, DALI resizes too (within 1 grey level of `video/resize.py`), so
only small frames are copied to the host, where the colour matrix is corrected. DALI ignores
rotation tags, so frames are rotated last.

Each job is decoded in one of two ways:

  DALI       `routing.dali_reads` accepts the file, and its full-size frames fit MAX_BATCH_BYTES
  FALLBACK   all other files, and files that DALI fails on: PyAV decodes them or returns the error

If one file makes DALI fail, the whole batch fails, and DALI does not name the file. The batch is
then halved until the file is alone. Example: file 3 of 4 is damaged.

  1, 2, 3, 4   fails, so it is halved
  1, 2         decoded
  3, 4         fails, so it is halved
  3            fails, so PyAV takes it; `num_fallbacks` grows by 1
  4            decoded

DALI's CPU decoder decodes every frame up to the last one requested. For long videos with many
keyframes `video.decoder=pyav` is several times faster and gives the same bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

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

try:
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType, DALIInterpType
except ModuleNotFoundError:
    raise ConfigError(
        "video.decoder=dali needs nvidia.dali, which is not installed; install "
        "megatron_vrl[cpu] or megatron_vrl[gpu], or set video.decoder=pyav."
    ) from None

MAX_BATCH = 32  # videos per pipeline run
MAX_BATCH_BYTES = 1 << 30  # full-size frames per pipeline run


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
        own = [i for i, job in enumerate(jobs) if self._can_read(job)]
        decoded = dict(zip(own, self._decode_own([jobs[i] for i in own]), strict=True))
        results = [decoded.get(i) for i in range(len(jobs))]
        rest = [i for i, frames in enumerate(results) if frames is None]
        self.num_fallbacks += len(rest)
        second = iter(self._pyav.decode([jobs[i] for i in rest]))
        return [next(second) if frames is None else frames for frames in results]

    def _can_read(self, job: DecodeJob) -> bool:
        """Return whether DALI decodes the file and its full-size frames fit into one batch."""
        return (
            dali_reads(job.file, self._cfg.device, self._capability)
            and _full_size_bytes(job) <= MAX_BATCH_BYTES
        )

    def _decode_own(self, jobs: Sequence[DecodeJob]) -> list[NDArray[np.uint8] | None]:
        """Return the frames of each job, None where DALI fails on the file."""
        return [frames for batch in _batches(jobs) for frames in self._run_or_halve(batch)]

    def _run_or_halve(self, jobs: list[DecodeJob]) -> list[NDArray[np.uint8] | None]:
        """Decode one batch. If it fails, decode its halves."""
        try:
            return list(self._run(jobs))
        except (RuntimeError, OSError):  # OSError: a file went away after it was probed
            self._pipeline = self._build()  # a failed pipeline cannot run again
        if len(jobs) == 1:
            return [None]
        half = len(jobs) // 2
        return self._run_or_halve(jobs[:half]) + self._run_or_halve(jobs[half:])

    def _run(self, jobs: list[DecodeJob]) -> list[NDArray[np.uint8]]:
        """Run the pipeline once.

        Each requested frame number is decoded once, then repeated as needed.
        """
        unique = [np.unique(job.plan.indices, return_inverse=True) for job in jobs]
        feed = {
            "encoded": [np.fromfile(job.file.path, np.uint8) for job in jobs],
            "wanted": [wanted.astype(np.int32) for wanted, _ in unique],
        }
        if self._cfg.device == "gpu":
            feed["size"] = [np.array(_size_before_rotation(job), np.float32) for job in jobs]
        (decoded,) = self._pipeline.run(**feed)
        decoded = decoded.as_cpu()
        finished = [self._finish(job, decoded.at(i)) for i, job in enumerate(jobs)]
        return [frames[order] for frames, (_, order) in zip(finished, unique, strict=True)]

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


def _full_size_bytes(job: DecodeJob) -> int:
    """Return the bytes of the job's frames before resizing."""
    return len(job.plan.indices) * job.file.height * job.file.width * 3


def _batches(jobs: Sequence[DecodeJob]) -> Iterator[list[DecodeJob]]:
    """Yield batches within MAX_BATCH and MAX_BATCH_BYTES, in order."""
    batch: list[DecodeJob] = []
    room = MAX_BATCH_BYTES
    for job in jobs:
        if batch and (len(batch) == MAX_BATCH or _full_size_bytes(job) > room):
            yield batch
            batch, room = [], MAX_BATCH_BYTES
        batch.append(job)
        room -= _full_size_bytes(job)
    if batch:
        yield batch
