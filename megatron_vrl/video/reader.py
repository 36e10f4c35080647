"""VideoReader: encodes video clips and images, with a frame store and prefetching. Start here.

`VideoReader.read` computes a digest of each file, looks up the frame store, decodes the clips and
images that the store does not have, and stores them. `encode` does it for clips alone. Files are
opened and decoded in separate processes that can be killed (`video/workers.py`); these processes
run `video/encode.py`. `VideoReader.prefetch` decodes those of the next step in the background.

The states of a clip or image:

  REQUESTED -> IDENTIFIED -> STORED    found in the frame store, or decoded and put into it
  REQUESTED -> RETRIED -> FAILED       still an error after `video.retries` further attempts

Example: of 3 clips one is stored, one is new and one is damaged, with `video.retries: 1`. `encode`
returns [EncodedVideo, EncodedVideo, VideoError]. `counts` grows by store 1, decoded 1, failed 1,
retried 1. If the damaged clip is requested again, its error is returned at once: a clip stays
FAILED for the life of the reader.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.types import EncodedImage, EncodedVideo, ImageFile, Media, VideoClip, Visual
from megatron_vrl.video.encode import DECODERS, Encoder, Identity, check_decoder
from megatron_vrl.video.image import ImageRules, family_rules
from megatron_vrl.video.rules import PixelRules
from megatron_vrl.video.store import VideoStore
from megatron_vrl.video.workers import Workers

if TYPE_CHECKING:
    from megatron_vrl.video.probe import DecodeJob

__all__ = ["DECODERS", "SAMPLING_KEYS", "VideoReader"]

SAMPLING_KEYS = (
    *("fps", "num_frames", "min_frames", "max_frames"),
    *("min_pixels", "max_pixels", "total_pixels"),
)
CACHE_VERSION = "3"  # increment when decoding changes the bytes of frames: it invalidates the store
VIDEOS_PER_DALI_TASK = 32
MAX_IDENTITIES = 1 << 16  # about 30 MB
IMAGE_VERSION = "1"  # increment when decoding changes the bytes of images
Result = Visual | VideoError


class VideoReader:
    """Encodes clips by the sampling rule of the config section `video`, and images by `images`.

    Each rank has one reader. `counts` has the number of clips and images by origin: "store",
    "decoded" and "failed". "retried" counts further attempts.
    """

    def __init__(self, cfg: Video, pixels: PixelRules, images: ImageRules | None = None):
        """`pixels` are those of the model's family. `images` None: the family's limits."""
        check_decoder(cfg)
        self._cfg = cfg
        images = images or family_rules(pixels)
        encoder = partial(Encoder, cfg, pixels, _gpu_index(cfg), images)
        self._workers = Workers(_num_processes(cfg), encoder)
        self.store = VideoStore(cfg.store_mib, cfg.store_dir, cfg.store_disk_mib)
        self.counts = Counter(store=0, decoded=0, failed=0, retried=0)
        self._lock = threading.Lock()  # protects state that the prefetch thread shares
        self._identities: dict[str, Identity] = {}
        self._failed: dict[Media, VideoError] = {}
        self._prefetched: dict[Media, Future[Any]] = {}
        # `device` is part of the key: frames from NVDEC and DALI's GPU resize differ from the CPU's
        # by a few grey levels.
        rule = cfg.model_dump_json(include={*SAMPLING_KEYS, "device"}) + CACHE_VERSION
        rule += f" {pixels.patch} {pixels.merge}"
        self._rule = hashlib.blake2b(rule.encode(), digest_size=8).hexdigest()
        limits = f"{images.min_pixels} {images.max_pixels} {pixels.patch} {pixels.merge}"
        image_rule = f"{limits} {IMAGE_VERSION}".encode()
        self._image_rule = hashlib.blake2b(image_rule, digest_size=8).hexdigest()

    def encode(self, clips: Sequence[VideoClip | str]) -> list[EncodedVideo | VideoError]:
        """Return one EncodedVideo or VideoError per clip, as `read` does.

        A path stands for the whole file.
        """
        wanted = [VideoClip(item) if isinstance(item, str) else item for item in clips]
        return [one for one in self.read(wanted) if not isinstance(one, EncodedImage)]

    def read(self, media: Sequence[Media]) -> list[Result]:
        """Return one EncodedVideo, EncodedImage or VideoError per medium, in order.

        An error names its file and does not affect the other media.
        """
        wanted = list(media)
        with self._lock:
            ahead = {item: self._prefetched.pop(item) for item in {*wanted} & {*self._prefetched}}
        found = {item: future.result()[item] for item, future in ahead.items()}
        found |= self._encode([item for item in dict.fromkeys(wanted) if item not in found])
        return [_with_path(item, found[item]) for item in wanted]

    def plan(self, clips: Sequence[VideoClip]) -> "list[DecodeJob | VideoError]":
        """Return the frames and the size that `encode` would produce, without decoding."""
        planned = self._call([(Encoder.plan, item) for item in clips])
        return [
            _named(item, plan) if isinstance(plan, VideoError) else plan
            for item, plan in zip(clips, planned, strict=True)
        ]

    def duration_s(self, path: str) -> float:
        """Return the duration of a file in seconds.

        Raises VideoError, whose message does not name the file.
        """
        [plan] = self._call([(Encoder.plan, VideoClip(path))])
        if isinstance(plan, VideoError):
            raise plan
        return float(plan.file.duration_s)

    def count_tokens(self, images: Sequence[ImageFile]) -> list[int | VideoError]:
        """Return the number of vision tokens of each image, from its header alone."""
        counted = self._call([(Encoder.count_tokens, item) for item in images])
        return [
            _named(item, found) if isinstance(found, VideoError) else found
            for item, found in zip(images, counted, strict=True)
        ]

    def prefetch(self, media: Iterable[Media]) -> None:
        """Start encoding media in a background thread, for a later call of `read`.

        Each call replaces the media of the previous call. At most `video.prefetch` of them are
        encoded.
        """
        future: Future[Any] = Future()
        wanted = list(dict.fromkeys(media))[: self._cfg.prefetch]
        with self._lock:
            self._prefetched = dict.fromkeys(wanted, future)
        if wanted:
            arguments = (future, self._encode, wanted)
            threading.Thread(target=_run_into_future, args=arguments, daemon=True).start()

    def _encode(self, media: Sequence[Media]) -> dict[Media, Result]:
        """Return the results from failed media, the store or the decoder. Updates `counts`."""
        results: dict[Media, Result] = {f: self._failed[f] for f in media if f in self._failed}
        keys: dict[Media, str] = {}
        for item, found in self._identify([f for f in media if f not in results]).items():
            if isinstance(found, VideoError):
                results[item] = found
            else:
                keys[item] = self._key(item, found)
        by_key = self._load_or_decode({key: item for item, key in keys.items()})
        results |= {item: by_key[key] for item, key in keys.items()}
        bad = {item: r for item, r in results.items() if isinstance(r, VideoError)}
        with self._lock:
            self._failed |= bad
            self.counts["failed"] += len(bad)
        return results

    def _identify(self, media: Sequence[Media]) -> dict[Media, Identity | VideoError]:
        """Return the digest of each file, with retries. Unchanged files are not read again."""

        def once(items: Sequence[Media]) -> dict[Media, Any]:
            calls = [(Encoder.identify, item, self._identities.get(item.path)) for item in items]
            return dict(zip(items, self._call(calls), strict=True))

        found = self._with_retries(once(media), once)
        known = {item.path: f for item, f in found.items() if isinstance(f, Identity)}
        with self._lock:
            if len(self._identities) > MAX_IDENTITIES:
                self._identities.clear()
            self._identities |= known
        return found

    def _load_or_decode(self, media: Mapping[str, Media]) -> dict[str, Result]:
        """Return results by store key. Copies of one file share a key and are decoded once."""
        found: dict[str, Result] = {k: v for k in media if (v := self.store.get(k)) is not None}
        missing = [key for key in media if key not in found]

        def call(keys: Sequence[str]) -> tuple[Any, ...]:
            items = [media[key] for key in keys]
            if isinstance(items[0], ImageFile):
                return Encoder.encode_images, items
            return Encoder.encode, items, [_digest(key) for key in keys]

        def once(keys: Sequence[str], batch: int = 1) -> dict[str, Result]:
            batches = _batches(keys, media, batch)
            calls = [call(of_batch) for of_batch in batches]
            results: dict[str, Result] = {}
            for keys_of, result in zip(batches, self._call(calls), strict=True):
                if isinstance(result, VideoError):  # hung or crashed: find the file one by one
                    results |= once(keys_of) if len(keys_of) > 1 else {keys_of[0]: result}
                else:
                    results |= dict(zip(keys_of, result, strict=True))
            return results

        batch = VIDEOS_PER_DALI_TASK if self._cfg.decoder == "dali" else 1
        decoded = self._with_retries(once(missing, batch), once)
        for key, video in decoded.items():
            if not isinstance(video, VideoError):
                self.store.put(key, video)
        with self._lock:
            self.counts["store"] += len(found)
            self.counts["decoded"] += sum(not isinstance(v, VideoError) for v in decoded.values())
        return found | decoded

    def _with_retries(
        self, first: dict[Any, Any], once: Callable[[list[Any]], dict[Any, Any]]
    ) -> dict[Any, Any]:
        """Return `first` after up to `video.retries` further attempts at the failed items.

        All items have been tried once before the first retry.
        """
        results = dict(first)
        for _ in range(self._cfg.retries):
            failed = [item for item, result in results.items() if isinstance(result, VideoError)]
            if not failed:
                break
            with self._lock:
                self.counts["retried"] += len(failed)
            results |= once(failed)
        return results

    def _call(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Submit tasks to the decoding processes and wait.

        A failed, hung or crashed task gives a VideoError.
        """
        futures: list[Future[Any]] = []
        for task, first, *others in calls:
            videos = len(first) if isinstance(first, list) else 1
            timeout_s = videos * self._cfg.timeout_s
            futures.append(self._workers.submit(timeout_s, task, first, *others))
        results: list[Any] = []
        for future in futures:
            try:
                results.append(future.result())
            except VideoError as error:
                results.append(error)
        return results

    def _key(self, clip: Media, identity: Identity) -> str:
        """Return the store key: file digest, digest of the sampling or pixel rule, and window."""
        if isinstance(clip, ImageFile):
            return f"{identity.digest}-image-{self._image_rule}"
        window = "" if clip.window_s is None else "-{:.3f}-{:.3f}".format(*clip.window_s)
        return f"{identity.digest}-{self._rule}{window}"


def _batches(keys: Sequence[str], media: Mapping[str, Media], size: int) -> list[list[str]]:
    """Return the keys of clips and those of images in batches of at most `size`."""
    clips = [key for key in keys if not isinstance(media[key], ImageFile)]
    images = [key for key in keys if isinstance(media[key], ImageFile)]
    return [
        of_kind[start : start + size]
        for of_kind in (clips, images)
        for start in range(0, len(of_kind), size)
    ]


def _digest(key: str) -> str:
    """Return the file digest of a store key."""
    return key.partition("-")[0]


def _num_processes(cfg: Video) -> int:
    """Return the number of decoding processes: one with DALI, which has its own threads."""
    return cfg.workers if cfg.decoder == "pyav" else 1  # DALI brings its own threads


def _gpu_index(cfg: Video) -> int | None:
    """Return the GPU that decodes; None on the CPU."""
    if cfg.device == "cpu":
        return None
    import torch

    return torch.cuda.current_device()


def _run_into_future(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    """Set the future to the result of `function`, or to the exception it raises."""
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # raised by `future.result()`
        future.set_exception(error)


def _named(item: Media, error: VideoError) -> VideoError:
    """Return the error with the path of its file."""
    return VideoError(f"{item.path} {error}", error.kind, item.path)


def _with_path(clip: Media, result: Result) -> Result:
    """Return a result that names the path of `clip`: copies of a file share one decoded video."""
    if isinstance(result, VideoError):
        return _named(clip, result)
    return result if result.path == clip.path else replace(result, path=clip.path)
