"""Encoder: the code that runs inside a decoding process. Files in, encoded media out.

The steps are `identify` (digest of the bytes), `plan` (frames and size), `decode`. To add a
decoder, write one file and add one row to `DECODERS`; a decoder is imported on first use.
`VideoReader` runs `Encoder` in the processes of `video/workers.py`. Tests and benchmarks call it
directly.
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
from megatron_vrl.types import EncodedImage, EncodedVideo, ImageFile, Media, VideoClip
from megatron_vrl.video.rules import PixelRules

if TYPE_CHECKING:
    from megatron_vrl.video.image import ImageRules
    from megatron_vrl.video.probe import DecodeJob


class Decoder(Protocol):
    """Interface of a video decoder."""

    def decode(self, jobs: "Sequence[DecodeJob]") -> list[NDArray[np.uint8] | VideoError]:
        """Return frames [F, height, width, 3] of each job at its plan's size, or a VideoError.

        A bad file gives an error for its own job only.
        """


def _dali(cfg: Video) -> Decoder:
    """Import and return the DALI decoder."""
    from megatron_vrl.video.dali import DaliDecoder

    return DaliDecoder(cfg)


def _pyav(cfg: Video) -> Decoder:
    """Import and return the PyAV decoder."""
    from megatron_vrl.video.pyav import PyavDecoder

    return PyavDecoder(cfg)


DECODERS: dict[str, Callable[[Video], Decoder]] = {"dali": _dali, "pyav": _pyav}


class Identity(NamedTuple):
    """Path, modification time, size and digest of a file. An unchanged file is not hashed again."""

    path: str  # local file
    modified_ns: int
    size: int  # bytes
    digest: str


def check_decoder(cfg: Video) -> None:
    """Raise ConfigError if this machine cannot run the configured decoder. Starts no decoder."""
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
    """Fetches, identifies, plans and decodes clips and images by the config section `video`.

    `pixels` are those of the model's family. `gpu` is the index of the GPU that decodes
    (video.device=gpu), else None. `images` are the pixel limits of images; None: the family's.
    """

    def __init__(
        self,
        cfg: Video,
        pixels: PixelRules,
        gpu: int | None = None,
        images: "ImageRules | None" = None,
    ):
        import torch

        from megatron_vrl.video.fetch import LocalCopies
        from megatron_vrl.video.image import family_rules

        torch.set_num_threads(1)  # parallelism is over videos, not inside one
        if gpu is not None:
            torch.cuda.set_device(gpu)
        self._cfg, self._pixels, self._images = cfg, pixels, images or family_rules(pixels)
        self._copies = LocalCopies(cfg.fetch_dir, cfg.fetch_mib)
        self.decoder = DECODERS[cfg.decoder](cfg)

    def identify(self, clip: Media, known: Identity | None) -> Identity:
        """Return the identity of a file; `known` if the file is unchanged.

        Raises VideoError, whose message does not name the file.
        """
        path, status = self._local_file(clip)
        seen = (path, status.st_mtime_ns, status.st_size)
        if known and known[:3] == seen:
            return known
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise _read_error(error) from None
        return Identity(*seen, digest.hexdigest())

    def encode(
        self, clips: Sequence[VideoClip], digests: Sequence[str]
    ) -> list[EncodedVideo | VideoError]:
        """Return one EncodedVideo or VideoError per clip, in order.

        Error messages do not name the file.
        """
        planned = _in_parallel(self._plan, clips, self._cfg.workers)
        jobs = [job for job in planned if not isinstance(job, VideoError)]
        decoded = iter(self.decoder.decode(jobs))
        results: list[EncodedVideo | VideoError] = []
        for wanted, digest, job in zip(clips, digests, planned, strict=True):
            frames = job if isinstance(job, VideoError) else next(decoded)
            if isinstance(frames, VideoError):
                results.append(frames)
            else:
                results.append(_to_encoded_video(wanted, digest, job, frames))
        return results

    def encode_images(self, images: Sequence[ImageFile]) -> list[EncodedImage | VideoError]:
        """Return one EncodedImage or VideoError per image, in order.

        Error messages do not name the file.
        """
        return _in_parallel(self._encode_image, images, self._cfg.workers)

    def _encode_image(self, image: ImageFile) -> EncodedImage | VideoError:
        """Return the encoded image, or the VideoError instead of raising it."""
        from megatron_vrl.video.image import encode_image

        try:
            path, _ = self._local_file(image)
            return encode_image(image.path, path, self._images)
        except VideoError as error:
            return error

    def count_tokens(self, image: ImageFile) -> int:
        """Return the number of vision tokens of an image, from the file's header.

        Raises VideoError, whose message does not name the file.
        """
        from megatron_vrl.video.image import image_tokens

        path, _ = self._local_file(image)
        return image_tokens(path, self._images)

    def plan(self, clip: VideoClip) -> "DecodeJob":
        """Return the frames and the size that decoding would give, from header and packets.

        `plan.num_tokens` of the result is the number of vision tokens. Raises VideoError, whose
        message does not name the file.
        """
        from megatron_vrl.video.probe import planned

        path, _ = self._local_file(clip)
        return planned(path, clip.window_s, self._cfg, self._pixels)

    def _plan(self, clip: VideoClip) -> "DecodeJob | VideoError":
        """Return the plan, or the VideoError instead of raising it."""
        try:
            return self.plan(clip)
        except VideoError as error:
            return error

    def _local_file(self, clip: Media) -> tuple[str, os.stat_result]:
        """Return path and status of the local file.

        Raises VideoError if it is missing, empty or no file.
        """
        path = self._local(clip)
        try:
            status = os.stat(path)
        except OSError as error:
            raise _read_error(error) from None
        if not stat.S_ISREG(status.st_mode):
            raise VideoError("is not a file; check the path.", "unreadable")
        if not status.st_size:
            raise VideoError("is empty; replace it.", "empty")
        return path, status

    def _local(self, clip: Media) -> str:
        """Return the local path of a clip: a fetched copy for a URL, else the path itself.

        Raises VideoError if the file is outside of the clip's folder after symlinks are resolved.
        """
        from megatron_vrl.video.fetch import is_url

        if is_url(clip.path):
            if not self._cfg.fetch_dir:
                raise ConfigError(
                    f"{clip.path} is a URL and needs a directory for its copy: set video.fetch_dir."
                )
            return self._copies.path(clip.path)
        if clip.folder:
            folder, path = os.path.realpath(clip.folder), os.path.realpath(clip.path)
            if os.path.commonpath([folder, path]) != folder:
                raise VideoError(
                    f"is a link out of the data folder {clip.folder}, to {path}; copy it there.",
                    "outside",
                )
        return clip.path


def _read_error(error: OSError) -> VideoError:
    """Return the VideoError for an operating system error."""
    kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
    return VideoError(f"cannot be read ({error.strerror}); check the path.", kind)


def _to_encoded_video(
    clip: VideoClip, digest: str, job: "DecodeJob", frames: NDArray[np.uint8]
) -> EncodedVideo:
    """Return the EncodedVideo of decoded frames and their plan."""
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
    """Map `function` over `items` in threads."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))
