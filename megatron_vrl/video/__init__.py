"""Videos: files in, EncodedVideo out. Start here.

`VideoReader.encode` goes digest -> store -> probe -> plan -> decoder -> store. A new decoder is one
file and one row of `DECODERS`. Decoders are imported when they are asked for, so that `video.rules`
stays free of torch and of decoders.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.types import EncodedVideo
from megatron_vrl.video.rules import plan_frames
from megatron_vrl.video.store import VideoStore

if TYPE_CHECKING:
    from megatron_vrl.video.pyav import DecodeJob

SAMPLING_KEYS = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")


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


class VideoReader:
    """Encodes videos by the sampling rule of its section; one per process.

    `counts` says where videos came from: "store", "decoded" or "failed".
    """

    def __init__(self, cfg: Video):
        self._cfg = cfg
        self.decoder = DECODERS[cfg.decoder](cfg)
        self.store = VideoStore(cfg.store_mib, cfg.store_dir, cfg.store_disk_mib)
        self.counts = Counter(store=0, decoded=0, failed=0)
        self._digests: dict[tuple[str, int, int], str] = {}
        # NVDEC and DALI's resize differ from the CPU by a few grey levels: their own keys.
        rule = cfg.model_dump_json(include={*SAMPLING_KEYS, "device"})
        self._rule = hashlib.blake2b(rule.encode(), digest_size=8).hexdigest()

    def encode(self, paths: Sequence[str]) -> list[EncodedVideo | VideoError]:
        """One result for each path, in order; an error names its file and harms no other."""
        keys = self._in_parallel(self._key, paths)
        first = {key: path for path, key in zip(paths, keys, strict=True) if isinstance(key, str)}
        found: dict[str, EncodedVideo | VideoError] = {}
        for key in first:
            if video := self.store.get(key):
                found[key] = video
        self.counts["store"] += len(found)
        found |= self._decode({key: path for key, path in first.items() if key not in found})
        results = [
            _for_path(path, found[key] if isinstance(key, str) else key)
            for path, key in zip(paths, keys, strict=True)
        ]
        self.counts["failed"] += sum(isinstance(result, VideoError) for result in results)
        return results

    def _decode(self, paths: dict[str, str]) -> dict[str, EncodedVideo | VideoError]:
        """By store key. Copies of one file share a key, so they are decoded once."""
        planned = self._in_parallel(self._plan, list(paths.values()))
        found: dict[str, EncodedVideo | VideoError] = {}
        jobs: dict[str, DecodeJob] = {}
        for key, plan in zip(paths, planned, strict=True):
            if isinstance(plan, VideoError):
                found[key] = plan
            else:
                jobs[key] = plan
        decoded = self.decoder.decode(list(jobs.values()))
        for (key, job), frames in zip(jobs.items(), decoded, strict=True):
            if isinstance(frames, VideoError):
                found[key] = frames
            else:
                found[key] = video = _encoded(job, frames, digest=key.partition("-")[0])
                self.store.put(key, video)
                self.counts["decoded"] += 1
        return found

    def _plan(self, path: str) -> "DecodeJob | VideoError":
        from megatron_vrl.video.pyav import DecodeJob, probe

        try:
            file = probe(path)
            plan = plan_frames(file.num_frames, file.native_fps, file.height, file.width, self._cfg)
        except VideoError as error:
            return error
        return DecodeJob(file, plan)

    def _key(self, path: str) -> str | VideoError:
        """Store key of a file as it is now; its bytes are read only when it changed."""
        try:
            status = Path(path).stat()
            seen = (path, status.st_mtime_ns, status.st_size)
            if not status.st_size:
                return VideoError("is empty; replace it.")
            if seen not in self._digests:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
                self._digests[seen] = digest.hexdigest()
        except OSError as error:
            return VideoError(f"cannot be read ({error.strerror}); check data_folder.")
        return f"{self._digests[seen]}-{self._rule}"

    def _in_parallel(self, function: Callable, paths: Sequence[str]) -> list:
        with ThreadPoolExecutor(self._cfg.workers) as pool:
            return list(pool.map(function, paths))


def _encoded(job: "DecodeJob", frames: NDArray[np.uint8], digest: str) -> EncodedVideo:
    file, plan = job.file, job.plan
    return EncodedVideo(
        path=file.path,
        digest=digest,
        codec=file.codec,
        duration_s=file.duration_s,
        frame_indices=plan.indices,
        timestamps_s=file.timestamps_s[plan.indices],
        sampled_fps=plan.sampled_fps,
        seconds_per_grid=plan.seconds_per_grid,
        grid_thw=plan.grid_thw,
        frames=frames,
    )


def _for_path(path: str, result: EncodedVideo | VideoError) -> EncodedVideo | VideoError:
    if isinstance(result, VideoError):
        return VideoError(f"{path} {result}")
    return result if result.path == path else replace(result, path=path)
