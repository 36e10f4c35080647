"""Videos: footage in, EncodedVideo out. Start here.

`VideoReader.encode` goes identify -> store -> decode -> store; files are opened and decoded in
processes that may be killed (`video/workers.py`), by what `video/encode.py` says. What a run may
need next is decoded ahead, in the background.
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
from megatron_vrl.types import EncodedVideo, VideoClip
from megatron_vrl.video.encode import DECODERS, Encoder, Identity, check_decoder
from megatron_vrl.video.store import VideoStore
from megatron_vrl.video.workers import Workers

if TYPE_CHECKING:
    from megatron_vrl.video.probe import DecodeJob

__all__ = ["DECODERS", "SAMPLING_KEYS", "VideoReader"]

SAMPLING_KEYS = (
    *("fps", "num_frames", "min_frames", "max_frames"),
    *("min_pixels", "max_pixels", "total_pixels"),
)
PIXELS = "2"  # raised when the same file and rule give other bytes, so that all is decoded anew
DALI_BATCH = 32  # videos of one task
MOST_KNOWN = 1 << 16  # identities remembered, about 30 MB
Result = EncodedVideo | VideoError


class VideoReader:
    """Encodes videos by the sampling rule of its section; one per rank.

    `counts` says where videos came from: "store", "decoded" or "failed"; "retried" ones count
    again. A file that stayed bad is not tried again by this reader.
    """

    def __init__(self, cfg: Video):
        check_decoder(cfg)
        self._cfg = cfg
        self._workers = Workers(_num_processes(cfg), partial(Encoder, cfg, _card(cfg)))
        self.store = VideoStore(cfg.store_mib, cfg.store_dir, cfg.store_disk_mib)
        self.counts = Counter(store=0, decoded=0, failed=0, retried=0)
        self._lock = threading.Lock()  # of what the background shares
        self._known: dict[str, Identity] = {}
        self._bad: dict[VideoClip, VideoError] = {}
        self._ahead: dict[VideoClip, Future[Any]] = {}
        # NVDEC and DALI's resize differ from the CPU by a few grey levels: their own keys.
        rule = cfg.model_dump_json(include={*SAMPLING_KEYS, "device"}) + PIXELS
        self._rule = hashlib.blake2b(rule.encode(), digest_size=8).hexdigest()

    def encode(self, clip: Sequence[VideoClip | str]) -> list[Result]:
        """One result for each, in order; an error names its file and harms no other.

        A path alone is the whole of its file.
        """
        wanted = [VideoClip(item) if isinstance(item, str) else item for item in clip]
        with self._lock:
            ahead = {item: self._ahead.pop(item) for item in {*wanted} & {*self._ahead}}
        found = {item: future.result()[item] for item, future in ahead.items()}
        found |= self._encode([item for item in dict.fromkeys(wanted) if item not in found])
        return [_named(item, found[item]) for item in wanted]

    def plan(self, clip: Sequence[VideoClip]) -> "list[DecodeJob | VideoError]":
        """What each holds and how it would be sampled, from header and packets alone."""
        planned = self._call([(Encoder.plan, item) for item in clip])
        return [
            VideoError(f"{item.path} {plan}", plan.kind) if isinstance(plan, VideoError) else plan
            for item, plan in zip(clip, planned, strict=True)
        ]

    def duration_s(self, path: str) -> float:
        """Raises VideoError, whose message does not name the file."""
        [plan] = self._call([(Encoder.plan, VideoClip(path))])
        if isinstance(plan, VideoError):
            raise plan
        return float(plan.file.duration_s)

    def prefetch(self, clip: Iterable[VideoClip]) -> None:
        """Encode in the background what `encode` will soon be asked for.

        Only what the last call named is kept, and at most `video.prefetch` videos.
        """
        future: Future[Any] = Future()
        wanted = list(dict.fromkeys(clip))[: self._cfg.prefetch]
        with self._lock:
            self._ahead = dict.fromkeys(wanted, future)
        if wanted:
            arguments = (future, self._encode, wanted)
            threading.Thread(target=_settle, args=arguments, daemon=True).start()

    def _encode(self, clip: Sequence[VideoClip]) -> dict[VideoClip, Result]:
        results: dict[VideoClip, Result] = {f: self._bad[f] for f in clip if f in self._bad}
        keys: dict[VideoClip, str] = {}
        for item, found in self._identified([f for f in clip if f not in results]).items():
            if isinstance(found, VideoError):
                results[item] = found
            else:
                keys[item] = self._key(item, found)
        by_key = self._of_keys({key: item for item, key in keys.items()})
        results |= {item: by_key[key] for item, key in keys.items()}
        bad = {item: r for item, r in results.items() if isinstance(r, VideoError)}
        with self._lock:
            self._bad |= bad
            self.counts["failed"] += len(bad)
        return results

    def _identified(self, clip: Sequence[VideoClip]) -> dict[VideoClip, Identity | VideoError]:
        def once(items: Sequence[VideoClip]) -> dict[VideoClip, Any]:
            calls = [(Encoder.identify, item, self._known.get(item.path)) for item in items]
            return dict(zip(items, self._call(calls), strict=True))

        found = self._retried(once(clip), once)
        known = {item.path: f for item, f in found.items() if isinstance(f, Identity)}
        with self._lock:
            if len(self._known) > MOST_KNOWN:
                self._known.clear()
            self._known |= known
        return found

    def _of_keys(self, clip: Mapping[str, VideoClip]) -> dict[str, Result]:
        """By store key. Copies of one file share a key, so they are decoded once."""
        found: dict[str, Result] = {k: v for k in clip if (v := self.store.get(k)) is not None}
        missing = [key for key in clip if key not in found]

        def once(keys: Sequence[str], batch: int = 1) -> dict[str, Result]:
            batches = [keys[start : start + batch] for start in range(0, len(keys), batch)]
            calls = [
                (Encoder.encode, [clip[key] for key in b], [_digest(key) for key in b])
                for b in batches
            ]
            results: dict[str, Result] = {}
            for keys_of, result in zip(batches, self._call(calls), strict=True):
                if isinstance(result, VideoError):  # the process ended: which of them was it?
                    results |= once(keys_of) if len(keys_of) > 1 else {keys_of[0]: result}
                else:
                    results |= dict(zip(keys_of, result, strict=True))
            return results

        batch = DALI_BATCH if self._cfg.decoder == "dali" else 1
        decoded = self._retried(once(missing, batch), once)
        for key, video in decoded.items():
            if isinstance(video, EncodedVideo):
                self.store.put(key, video)
        with self._lock:
            self.counts["store"] += len(found)
            self.counts["decoded"] += sum(isinstance(v, EncodedVideo) for v in decoded.values())
        return found | decoded

    def _retried(
        self, first: dict[Any, Any], once: Callable[[list[Any]], dict[Any, Any]]
    ) -> dict[Any, Any]:
        """`first` with what failed tried again, after all others had their turn."""
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
        """Results of tasks in the processes; a VideoError where one hung, crashed or raised it."""
        futures: list[Future[Any]] = []
        for task, first, *others in calls:
            videos = len(first) if task is Encoder.encode else 1
            timeout_s = videos * self._cfg.timeout_s
            futures.append(self._workers.submit(timeout_s, task, first, *others))
        results: list[Any] = []
        for future in futures:
            try:
                results.append(future.result())
            except VideoError as error:
                results.append(error)
        return results

    def _key(self, clip: VideoClip, identity: Identity) -> str:
        window = "" if clip.window_s is None else "-{:.3f}-{:.3f}".format(*clip.window_s)
        return f"{identity.digest}-{self._rule}{window}"


def _digest(key: str) -> str:
    return key.partition("-")[0]


def _num_processes(cfg: Video) -> int:
    return cfg.workers if cfg.decoder == "pyav" else 1  # DALI brings its own threads


def _card(cfg: Video) -> int | None:
    if cfg.device == "cpu":
        return None
    import torch

    return torch.cuda.current_device()


def _settle(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)


def _named(clip: VideoClip, result: Result) -> Result:
    if isinstance(result, VideoError):
        return VideoError(f"{clip.path} {result}", result.kind)
    return result if result.path == clip.path else replace(result, path=clip.path)
