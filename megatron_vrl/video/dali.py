"""Decodes with NVIDIA DALI: on the CPU, or on the GPU with NVDEC. The only owner of nvidia.dali.

One pipeline lives as long as the decoder; a run takes the bytes of several files and a list of
frame numbers for each. On the CPU frames leave it at full size and go through the project's one
resize, so they equal PyAV's byte for byte. On the GPU DALI resizes too (within 1 of that), only
small frames cross to the host, and the matrix a file is tagged with is made good there. DALI heeds
no rotation tag, so its frames are turned afterwards.

A file DALI cannot read ends the run for the whole batch and does not say which file it was. So
files are probed before they come here, a failing batch is halved until the file stands alone, and
that file goes to PyAV, which decodes it or says what is wrong. PyAV also takes what DALI cannot
read (`video/routing.py`) and videos whose full-size frames would fill the memory.
`num_handed_over` counts all of these.

DALI's CPU decoder reads every frame up to the last wanted one; for long videos with many keyframes
`video.decoder=pyav` is several times faster and gives the same bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.video.colour import corrected
from megatron_vrl.video.probe import DecodeJob
from megatron_vrl.video.pyav import PyavDecoder
from megatron_vrl.video.resize import resize, turned
from megatron_vrl.video.routing import dali_reads

try:
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType, DALIInterpType
except ModuleNotFoundError:
    raise ConfigError(
        "video.decoder=dali needs nvidia.dali, which is not installed; install "
        "megatron_vrl[cpu] or megatron_vrl[gpu], or set video.decoder=pyav."
    ) from None

BATCH = 32  # most videos of one run
BATCH_BYTES = 1 << 30  # most bytes of full-size frames of one run


class DaliDecoder:
    """`device_id` of a GPU is torch's current device, which the program sets from its rank."""

    def __init__(self, cfg: Video):
        if cfg.device == "gpu" and not torch.cuda.is_available():
            raise ConfigError("video.device=gpu, but torch sees no GPU; set video.device=cpu.")
        self._cfg = cfg
        self._card = torch.cuda.get_device_capability() if cfg.device == "gpu" else (0, 0)
        self._pyav = PyavDecoder(cfg.model_copy(update={"device": "cpu"}))
        self._pipeline = self._build()
        self.num_handed_over = 0

    def decode(self, jobs: Sequence[DecodeJob]) -> list[NDArray[np.uint8] | VideoError]:
        """[F, height, width, 3] at the plan's size for each job, or why not."""
        own = [i for i, job in enumerate(jobs) if self._can_read(job)]
        decoded = dict(zip(own, self._decode_own([jobs[i] for i in own]), strict=True))
        results = [decoded.get(i) for i in range(len(jobs))]
        rest = [i for i, frames in enumerate(results) if frames is None]
        self.num_handed_over += len(rest)
        second = iter(self._pyav.decode([jobs[i] for i in rest]))
        return [next(second) if frames is None else frames for frames in results]

    def _can_read(self, job: DecodeJob) -> bool:
        return (
            dali_reads(job.file, self._cfg.device, self._card) and _full_bytes(job) <= BATCH_BYTES
        )

    def _decode_own(self, jobs: Sequence[DecodeJob]) -> list[NDArray[np.uint8] | None]:
        """None where DALI refuses the file."""
        return [frames for batch in _batches(jobs) for frames in self._run_or_halve(batch)]

    def _run_or_halve(self, jobs: list[DecodeJob]) -> list[NDArray[np.uint8] | None]:
        try:
            return list(self._run(jobs))
        except (RuntimeError, OSError):  # OSError: a file went away after it was probed
            self._pipeline = self._build()  # the old one stays dead
        if len(jobs) == 1:
            return [None]
        half = len(jobs) // 2
        return self._run_or_halve(jobs[:half]) + self._run_or_halve(jobs[half:])

    def _run(self, jobs: list[DecodeJob]) -> list[NDArray[np.uint8]]:
        unique = [np.unique(job.plan.indices, return_inverse=True) for job in jobs]
        feed = {
            "encoded": [np.fromfile(job.file.path, np.uint8) for job in jobs],
            "wanted": [wanted.astype(np.int32) for wanted, _ in unique],
        }
        if self._cfg.device == "gpu":
            feed["size"] = [np.array(_size_before_turning(job), np.float32) for job in jobs]
        (decoded,) = self._pipeline.run(**feed)
        decoded = decoded.as_cpu()
        finished = [self._finished(job, decoded.at(i)) for i, job in enumerate(jobs)]
        return [frames[order] for frames, (_, order) in zip(finished, unique, strict=True)]

    def _finished(self, job: DecodeJob, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._cfg.device == "gpu":
            frames = corrected(frames, job.file.matrix)
        shown = turned(frames, job.file.quarter_turns)
        return resize(shown, job.plan.height, job.plan.width)

    def _build(self) -> Pipeline:
        on_gpu = self._cfg.device == "gpu"
        pipeline = Pipeline(
            batch_size=BATCH,
            num_threads=self._cfg.workers,
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=1,  # an error comes up in the run that caused it
            exec_dynamic=True,
        )
        with pipeline:
            pipeline.set_outputs(_graph(on_gpu))
        pipeline.build()
        return pipeline


def _graph(on_gpu: bool) -> Any:
    encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
    wanted = fn.external_source(name="wanted", dtype=DALIDataType.INT32, ndim=1)
    frames = fn.decoders.video(encoded, frames=wanted, device="mixed" if on_gpu else "cpu")
    if not on_gpu:
        return frames
    size = fn.external_source(name="size", dtype=DALIDataType.FLOAT, ndim=1)
    cubic = DALIInterpType.INTERP_CUBIC
    return fn.resize(frames, size=size, interp_type=cubic, antialias=True)


def _size_before_turning(job: DecodeJob) -> tuple[int, int]:
    size = (job.plan.height, job.plan.width)
    return size[::-1] if job.file.quarter_turns % 2 else size


def _full_bytes(job: DecodeJob) -> int:
    return len(job.plan.indices) * job.file.height * job.file.width * 3


def _batches(jobs: Sequence[DecodeJob]) -> Iterator[list[DecodeJob]]:
    batch: list[DecodeJob] = []
    room = BATCH_BYTES
    for job in jobs:
        if batch and (len(batch) == BATCH or _full_bytes(job) > room):
            yield batch
            batch, room = [], BATCH_BYTES
        batch.append(job)
        room -= _full_bytes(job)
    if batch:
        yield batch
