"""A hand-over of weights to a vLLM engine, beside a plain copy of the same bytes into memory that
is there already, in turns. Paths: `colocated`, the trainer's tensors in the engine's own process;
`shared-memory`, through the buckets that a worker on the same machine reads. Stages: export (what
the trainer gathers), write (into the bucket), load (into the engine's layers; on a CPU vLLM packs
each for its kernels), finish (the rest, and the caches)."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STAGES = ("export", "write", "load", "finish")
TOOLS = Path(__file__).resolve().parents[1]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=1024, help="of the language model")
    parser.add_argument("--layers", type=int, default=10, help="of the language model")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of(Path(folder) / "hf", arguments.hidden, arguments.layers)
        export, engine, writer = _sides(checkpoint)
        num_bytes, copy = _plain_copy(export)
        rounds: dict[str, list[Row]] = {"colocated": [], "shared-memory": []}
        copies: list[float] = []
        for number in range(1 + arguments.rounds):  # the first warms up
            seconds = _timed(copy)
            measured = {
                "colocated": _hand_over(export, engine, None, number),
                "shared-memory": _hand_over(export, engine, writer, number),
            }
            if number > 0:
                copies.append(seconds)
                for path, row in measured.items():
                    rounds[path].append(row)
    base = statistics.median(copies)
    for path, rows in rounds.items():
        seconds = statistics.median(sum(row.values()) for row in rows)
        stages = {f"{s}_s": statistics.median(row[s] for row in rows) for s in STAGES}
        yield {
            "bench": "sync",
            "path": path,
            "bytes": num_bytes,
            **stages,
            "median_s": seconds,
            "copy_s": base,
            "ratio_to_copy": seconds / base,
        }


def checkpoint_of(folder: Path, hidden: int, layers: int) -> Path:
    """Random weights of these sizes, with a tokenizer."""
    sys.path.append(str(TOOLS))
    import make_tiny_model

    sizes = {"hidden": hidden, "mlp": 4 * hidden, "heads": 16, "kv-heads": 4, "layers": layers}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    with redirect_stdout(sys.stderr):  # stdout is for rows
        make_tiny_model.main(["--out", str(folder), *options])
    return folder


def _sides(checkpoint: Path) -> tuple[Any, Any, Any]:
    from megatron_vrl.config import Model, Parallel, Rollout
    from megatron_vrl.model.architecture import read_architecture
    from megatron_vrl.model.export import WeightExport
    from megatron_vrl.model.weights import load_published
    from megatron_vrl.parallel.mesh import init_mesh
    from megatron_vrl.rollout.buckets import BucketWriter
    from megatron_vrl.rollout.engine import ColocatedEngine
    from megatron_vrl.training.policy import Policy

    mesh = init_mesh(Parallel(), seed=1)
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_published(policy.chunks, checkpoint)
    rollout = Rollout(max_sequences=8, kv_cache_mib=64)
    engine = ColocatedEngine(str(checkpoint), rollout, dtype="float32", seed=1, max_model_len=256)
    return WeightExport(policy.chunks), engine, BucketWriter(engine.dtype)


def _plain_copy(export: Any) -> tuple[int, Callable[[], None]]:
    import torch

    source = [tensor.clone() for _, tensor in export.tensors()]
    target = [torch.zeros_like(tensor) for tensor in source]

    def copy() -> None:
        for into, of in zip(target, source, strict=True):
            into.copy_(of)

    return sum(tensor.nbytes for tensor in source), copy


def _hand_over(export: Any, engine: Any, writer: Any, version: int) -> dict[str, float]:
    spent = dict.fromkeys(STAGES, 0.0)
    engine.start_update()
    for bucket in export.buckets():
        begin = time.perf_counter()
        weights: Any = list(bucket)
        exported = time.perf_counter()
        if writer is not None:
            weights = writer.write(weights)
        written = time.perf_counter()
        engine.load(weights)
        spent["export"] += exported - begin
        spent["write"] += written - exported
        spent["load"] += time.perf_counter() - written
    spent["finish"] = _timed(lambda: engine.finish_update(version))
    return spent


def _timed(does: Callable[[], None]) -> float:
    begin = time.perf_counter()
    does()
    return time.perf_counter() - begin
