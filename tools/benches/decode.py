"""Time from a file to resized frames of Qwen's size, N frames spread over it, one thread a video.

Paths: `pyav-sequential` decodes every frame in order; `ours-pyav` and `ours-dali` are this
project's decoders, including the scan of the file; `torchcodec` and `decord` run where they can be
imported (pip install -e '.[bench]') and their frames are resized by our code; `store-disk` and
`store-memory` read the frames from the store, as a second epoch does; `workers-K` decodes four
copies of the file in K processes and gives the seconds of one video; `ours-nvdec` needs a GPU. The
paths run in turns; a row has medians over --rounds. `cpu_s` is the CPU time of this process, which
other programs change little; it leaves out the decoding processes of `workers-K` and the store."""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS

Row = dict[str, Any]
COPIES = 4  # videos of a `workers-K` round
Once = Callable[[], Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILES", help="videos")
    parser.add_argument("--frames", type=int, default=16, help="frames taken from a video")
    parser.add_argument(
        "--paths", default="", help="paths to measure, separated by commas (default: all)"
    )


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    from megatron_vrl.config import Video

    wanted = set(filter(None, arguments.paths.split(",")))
    for file in arguments.files:
        with tempfile.TemporaryDirectory() as folder:
            cfg = Video(num_frames=arguments.frames, decoder="pyav", store_dir=folder)
            paths = _paths(file, cfg, wanted)
            seconds: dict[str, list[float]] = {name: [] for name in paths}
            cpu: dict[str, list[float]] = {name: [] for name in paths}
            for number in range(1 + arguments.rounds):  # the first warms up
                for name, once in paths.items():
                    start, cpu_start = time.perf_counter(), time.process_time()
                    once()
                    spent, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
                    if number > 0:
                        seconds[name].append(spent / (COPIES if "workers" in name else 1))
                        cpu[name].append(cpu_s)
        base = statistics.median(seconds["pyav-sequential"])
        for name, timings in seconds.items():
            median_s = statistics.median(timings)
            yield {
                "bench": "decode",
                "path": name,
                "file": Path(file).name,
                "frames": arguments.frames,
                "median_s": median_s,
                "ratio_to_pyav_sequential": median_s / base,
                "min_s": min(timings),
                "max_s": max(timings),
                "frames_s": arguments.frames / median_s,
                "cpu_s": statistics.median(cpu[name]),
            }


def _paths(file: str, cfg: Any, wanted: set[str]) -> dict[str, Once]:
    """Return name -> one round, for the paths in `wanted` (all if empty). Only these are set up."""
    import torch

    from megatron_vrl.types import VideoClip
    from megatron_vrl.video.encode import Encoder
    from megatron_vrl.video.probe import planned
    from megatron_vrl.video.pyav import decode_frames

    torch.set_num_threads(1)
    job = planned(file, None, cfg, PIXELS)

    def ours(**keys: str) -> Once:
        encoder = Encoder(cfg.model_copy(update={"workers": 1, **keys}), PIXELS)
        return lambda: encoder.encode([VideoClip(file)], [""])

    makers: dict[str, Callable[[], Once | None]] = {
        "pyav-sequential": lambda: lambda: decode_frames(job.file, job.plan, seek=False),
        "ours-pyav": ours,
        "ours-dali": lambda: ours(decoder="dali"),
        "store-memory": lambda: _stored(file, cfg, store_mib=cfg.store_mib),
        "store-disk": lambda: _stored(file, cfg, store_mib=1),
    }
    if torch.cuda.is_available():
        makers["ours-nvdec"] = lambda: ours(decoder="dali", device="gpu")
    for name, rival in {"torchcodec": _torchcodec, "decord": _decord}.items():
        if importlib.util.find_spec(name):
            makers[name] = partial(rival, file, job.plan)
    for count in sorted({1, len(os.sched_getaffinity(0))}):
        makers[f"workers-{count}"] = partial(_parallel, file, cfg, count)
    taken = {
        name: make()
        for name, make in makers.items()
        if not wanted or name in wanted or name == "pyav-sequential"
    }
    return {name: once for name, once in taken.items() if once is not None}


def _torchcodec(file: str, plan: Any) -> Once | None:
    from megatron_vrl.video.resize import resize

    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):  # it finds no FFmpeg it can load
        return None

    def once() -> Any:
        decoder = VideoDecoder(file, num_ffmpeg_threads=1, dimension_order="NHWC")
        frames = decoder.get_frames_at(plan.indices.tolist()).data.numpy()
        return resize(frames, plan.height, plan.width)

    return once


def _decord(file: str, plan: Any) -> Once | None:
    from decord import VideoReader

    from megatron_vrl.video.resize import resize

    def once() -> Any:
        frames = VideoReader(file, num_threads=1).get_batch(plan.indices.tolist()).asnumpy()
        return resize(frames, plan.height, plan.width)

    return once


def _stored(file: str, cfg: Any, store_mib: int) -> Once:
    from megatron_vrl.video import VideoReader

    reader = VideoReader(cfg.model_copy(update={"workers": 1, "store_mib": store_mib}), PIXELS)
    reader.encode([file])
    return lambda: reader.encode([file])


def _parallel(file: str, cfg: Any, count: int) -> Once:
    from megatron_vrl.types import VideoClip
    from megatron_vrl.video.encode import Encoder
    from megatron_vrl.video.workers import Workers

    def once(workers: Workers) -> None:
        calls = (Encoder.encode, [VideoClip(file)], [""])
        for future in [workers.submit(600.0, *calls) for _ in range(COPIES)]:
            future.result()

    return partial(once, Workers(count, partial(Encoder, cfg, PIXELS)))
