"""One process's side of encoding: files in, EncodedVideo out. Nothing here is remembered.

identify -> plan -> decode. A new decoder is one file and one row of `DECODERS`; they are imported
when they are asked for. `Encoder` runs inside `video/workers.py`; tests and benches call it as it
is.
"""

import hashlib
import importlib.util
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.types import EncodedVideo, VideoClip

if TYPE_CHECKING:
    from megatron_vrl.video.probe import DecodeJob


class Decoder(Protocol):
    def decode(self, jobs: "Sequence[DecodeJob]") -> list[NDArray[np.uint8] | VideoError]:
        """[F, height, width, 3] for each job at its plan's size; an error for a bad file only."""


def _dali(cfg: Video) -> Decoder:
    from megatron_vrl.video.dali import DaliDecoder

    return DaliDecoder(cfg)


def _pyav(cfg: Video) -> Decoder:
    from megatron_vrl.video.pyav import PyavDecoder

    return PyavDecoder(cfg)


DECODERS: dict[str, Callable[[Video], Decoder]] = {"dali": _dali, "pyav": _pyav}


class Identity(NamedTuple):
    """The bytes of a file as they were seen: they are read again only when the rest changed."""

    path: str  # of the local file
    modified_ns: int
    size: int  # bytes
    digest: str


def check_decoder(cfg: Video) -> None:
    """Raises ConfigError for a decoder that this machine cannot have, without starting it."""
    if cfg.decoder == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        raise ConfigError(
            "video.decoder=dali needs nvidia.dali, which is not installed; install "
            "megatron_vrl[cpu] or megatron_vrl[gpu], or set video.decoder=pyav."
        )
    if cfg.device == "gpu":
        import torch

        if cfg.decoder != "dali":
            raise ConfigError(
                f"video.device=gpu needs video.decoder=dali; {cfg.decoder} decodes on the CPU."
            )
        if not torch.cuda.is_available():
            raise ConfigError("video.device=gpu, but torch sees no GPU; set video.device=cpu.")


class Encoder:
    """`card`: index of the GPU that decodes, where video.device=gpu."""

    def __init__(self, cfg: Video, card: int | None = None):
        import torch

        from megatron_vrl.video.fetch import LocalCopies

        torch.set_num_threads(1)  # videos are the unit of parallel work
        if card is not None:
            torch.cuda.set_device(card)
        self._cfg = cfg
        self._copies = LocalCopies(cfg.fetch_dir, cfg.fetch_mib)
        self.decoder = DECODERS[cfg.decoder](cfg)

    def identify(self, clip: VideoClip, known: Identity | None) -> Identity:
        """Raises VideoError, whose message does not name the file."""
        path, status = self._file(clip)
        seen = (path, status.st_mtime_ns, status.st_size)
        if known and known[:3] == seen:
            return known
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise _cannot_be_read(error) from None
        return Identity(*seen, digest.hexdigest())

    def encode(
        self, clip: Sequence[VideoClip], digests: Sequence[str]
    ) -> list[EncodedVideo | VideoError]:
        """One result for each, in order; no error names its file."""
        planned = _in_parallel(self._plan, clip, self._cfg.workers)
        jobs = [job for job in planned if not isinstance(job, VideoError)]
        decoded = iter(self.decoder.decode(jobs))
        results: list[EncodedVideo | VideoError] = []
        for wanted, digest, job in zip(clip, digests, planned, strict=True):
            frames = job if isinstance(job, VideoError) else next(decoded)
            if isinstance(frames, VideoError):
                results.append(frames)
            else:
                results.append(_encoded(wanted, digest, job, frames))
        return results

    def plan(self, clip: VideoClip) -> "DecodeJob":
        """What decoding would give, from header and packets: `plan.num_tokens` above all.

        Raises VideoError, whose message does not name the file.
        """
        from megatron_vrl.video.probe import planned

        path, _ = self._file(clip)
        return planned(path, clip.window_s, self._cfg)

    def _plan(self, clip: VideoClip) -> "DecodeJob | VideoError":
        try:
            return self.plan(clip)
        except VideoError as error:
            return error

    def _file(self, clip: VideoClip) -> tuple[str, os.stat_result]:
        """Path of a local file with something in it."""
        path = self._local(clip)
        try:
            status = os.stat(path)
        except OSError as error:
            raise _cannot_be_read(error) from None
        if not stat.S_ISREG(status.st_mode):
            raise VideoError("is not a file; check the path.", "unreadable")
        if not status.st_size:
            raise VideoError("is empty; replace it.", "empty")
        return path, status

    def _local(self, clip: VideoClip) -> str:
        from megatron_vrl.video.fetch import is_url

        if is_url(clip.path):
            if not self._cfg.fetch_dir:
                raise ConfigError(
                    f"{clip.path} is a URL, which needs a place for its copy: set video.fetch_dir."
                )
            return self._copies.path(clip.path)
        if clip.folder:
            folder, path = os.path.realpath(clip.folder), os.path.realpath(clip.path)
            if os.path.commonpath([folder, path]) != folder:
                raise VideoError(
                    f"leads out of the data folder {clip.folder}, to {path}; copy it there.",
                    "outside",
                )
        return clip.path


def _cannot_be_read(error: OSError) -> VideoError:
    kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
    return VideoError(f"cannot be read ({error.strerror}); check the path.", kind)


def _encoded(
    clip: VideoClip, digest: str, job: "DecodeJob", frames: NDArray[np.uint8]
) -> EncodedVideo:
    file, plan = job.file, job.plan
    start_s, end_s = clip.window_s or (0.0, file.duration_s)
    return EncodedVideo(
        path=clip.path,
        digest=digest,
        codec=file.codec,
        duration_s=min(end_s, file.duration_s) - max(start_s, 0.0),
        frame_indices=plan.indices,
        timestamps_s=file.timestamps_s[plan.indices],
        sampled_fps=plan.sampled_fps,
        seconds_per_grid=plan.seconds_per_grid,
        grid_thw=plan.grid_thw,
        frame_budget=plan.frame_budget,
        frames=frames,
    )


def _in_parallel(function: Callable[..., Any], items: Sequence[Any], workers: int) -> list[Any]:
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))
