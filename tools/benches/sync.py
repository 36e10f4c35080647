"""Weight sync to a vLLM engine, beside a copy of the same bytes into allocated memory.

Paths, one after another: `colocated` loads the trainer's tensors into an engine in its own process;
the others send them to a rollout worker on this machine, one for each `rollout.transport` that
works here. Stages: export (gather), push (fill a bucket, wait for the previous one), flush (wait
for the last bucket), commit (versions and caches)."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vrl.errors import RolloutError

Row = dict[str, Any]
STAGES = ("export", "push", "flush", "commit")
TRANSPORTS = ("shared_memory", "cuda_ipc", "broadcast", "http")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=1024, help="size of the language model")
    parser.add_argument("--layers", type=int, default=10, help="size of the language model")
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="rank of adapters that the export merges; 0: none"
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="set rollout.cpu_prepack_weights, which packs for oneDNN",
    )


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cfg = _config(folder, arguments)
        wait_until_serving = stack.enter_context(_worker(folder, cfg))
        export, sides = _sides(cfg, wait_until_serving)
        num_bytes, copy = _plain_copy(export)
        for path, side in sides:
            with side as engine:
                copies, rows = _in_turns(copy, export, engine, arguments.rounds)
            base = statistics.median(copies)
            seconds = statistics.median(sum(row.values()) for row in rows)
            stages = {f"{s}_s": statistics.median(row[s] for row in rows) for s in STAGES}
            yield {
                "bench": "sync",
                "path": path,
                "bytes": num_bytes,
                "lora_rank": arguments.lora_rank,
                **stages,
                "median_s": seconds,
                "copy_s": base,
                "ratio_to_copy": seconds / base,
            }


def _in_turns(
    copy: Callable[[], None], export: Any, engine: Any, rounds: int
) -> tuple[list[float], list[Row]]:
    """Return seconds of copies and of weight syncs; the first round warms up."""
    measured = [(_timed(copy), _sync_all(export, engine, version)) for version in range(1 + rounds)]
    copies, rows = zip(*measured[1:], strict=True)
    return list(copies), list(rows)


def checkpoint_of(folder: Path, hidden: int, layers: int) -> Path:
    """Write a checkpoint of random weights of these sizes, with a tokenizer; return its folder."""
    import make_tiny_model

    sizes = {"hidden": hidden, "mlp": 4 * hidden, "heads": 16, "kv-heads": 4, "layers": layers}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    with redirect_stdout(sys.stderr):  # stdout is for rows
        make_tiny_model.main(["--out", str(folder), *options])
    return folder


def _config(folder: Path, arguments: argparse.Namespace) -> Any:
    import torch
    import yaml

    from megatron_vrl.config import load_config

    on_gpu = torch.cuda.is_available()
    checkpoint = checkpoint_of(folder / "hf", arguments.hidden, arguments.layers)
    tree = {
        "run": {"out_dir": str(folder / "run")},
        "model": {
            "checkpoint": str(checkpoint),
            "dtype": "bfloat16" if on_gpu else "float32",
            "lora": {"rank": arguments.lora_rank},
            "freeze_vision": arguments.lora_rank > 0,
            "freeze_merger": arguments.lora_rank > 0,
        },
        "data": {"max_prompt_tokens": 128},
        "rollout": {
            "discovery_dir": str(folder / "found"),
            "max_num_seqs": 8,
            "max_response_tokens": 64,
            "kv_cache_mib": 64,
            "gpu_memory_utilization": 0.3,  # two engines and the trainer
            "cpu_prepack_weights": arguments.packed,
        },
        "evaluation": {"max_response_tokens": 64},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(folder / "config.yaml")


@contextmanager
def _worker(folder: Path, cfg: Any) -> Iterator[Callable[[], None]]:
    """Run a rollout worker in its own process during the block; yield a function that waits until
    the worker serves."""
    command = [sys.executable, "-m", "megatron_vrl.cli.worker"]
    process = subprocess.Popen(
        [*command, "--config", str(folder / "config.yaml")], stdout=subprocess.PIPE, text=True
    )

    def wait_until_serving() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if line.startswith("worker: serving"):
                return
        raise RolloutError(f"The worker ended with exit code {process.wait()}: see its output.")

    try:
        yield wait_until_serving
    finally:
        process.kill()
        process.wait()


def _sides(
    cfg: Any, wait_until_serving: Callable[[], None]
) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """Return the trainer's export, and by path a context with the calls of a weight sync.

    vLLM sizes its KV cache by the change of a GPU's free memory, so this process starts its engine
    after the worker has started its own.
    """
    from megatron_vrl.checkpoint.hf_export import WeightExport
    from megatron_vrl.checkpoint.hf_load import load_hf_weights
    from megatron_vrl.config import Parallel
    from megatron_vrl.models.architecture import read_architecture
    from megatron_vrl.parallel.mesh import init_mesh
    from megatron_vrl.policy.policy import Policy
    from megatron_vrl.rollout.backends import start_engine
    from megatron_vrl.rollout.in_process import InProcessEngine
    from megatron_vrl.rollout.vllm.startup import import_vllm
    from megatron_vrl.rollout.workers.pool import WorkerPool
    from megatron_vrl.rollout.workers.worker_info import served_model

    checkpoint = Path(cfg.model.checkpoint)
    mesh = init_mesh(Parallel(), seed=1)
    policy = Policy(read_architecture(checkpoint), cfg.model, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    import_vllm()
    wait_until_serving()
    engine = start_engine(cfg, checkpoint)
    served = served_model(cfg, checkpoint, engine.banned_token_ids)

    def sides() -> Iterator[tuple[str, Any]]:
        yield "colocated", _colocated_side(InProcessEngine(engine))
        for transport in TRANSPORTS:
            rollout = cfg.rollout.model_copy(update={"transport": transport})
            pool = WorkerPool(rollout, served, mesh.device)
            try:
                pool.serialize_stages(pool.wait_ready(1))
            except RolloutError as error:
                print(f"bench: {error}", file=sys.stderr)
                pool.close()
            else:
                yield transport, _worker_side(pool)

    return WeightExport(policy.chunks, engine.dtype), sides()


def _plain_copy(export: Any) -> tuple[int, Callable[[], None]]:
    import torch

    source = [tensor.clone() for _, tensor in export.tensors()]
    target = [torch.zeros_like(tensor) for tensor in source]

    def copy() -> None:
        for into, of in zip(target, source, strict=True):
            into.copy_(of)

    return sum(tensor.nbytes for tensor in source), copy


@dataclass(frozen=True)
class _Side:
    """Calls of one weight sync."""

    begin: Callable[[], None]
    push: Callable[[Any], None]
    flush: Callable[[], None]
    commit: Callable[[int], None]


@contextmanager
def _colocated_side(engine: Any) -> Iterator[_Side]:
    yield _Side(engine.begin_sync, engine.push, lambda: None, engine.commit)


@contextmanager
def _worker_side(pool: Any) -> Iterator[_Side]:
    workers = pool.wait_ready(1)

    def commit(version: int) -> None:
        pool.commit(workers, version)
        assert not pool.failed, pool.failed
        pool.activate(workers, version)

    with closing(pool):
        yield _Side(
            begin=lambda: pool.begin_sync(workers),
            push=lambda tensors: pool.push(workers, tensors),
            flush=pool.flush,
            commit=commit,
        )


def _sync_all(export: Any, side: _Side, version: int) -> dict[str, float]:
    spent = dict.fromkeys(STAGES, 0.0)
    spent["commit"] += _timed(side.begin)
    for bucket in export.buckets():
        exported = _Timed(bucket)
        spent["push"] += _timed(partial(side.push, exported)) - exported.seconds
        spent["export"] += exported.seconds
    spent["flush"] = _timed(side.flush)
    spent["commit"] += _timed(lambda: side.commit(version))
    return spent


class _Timed:
    """Iterator that counts the seconds spent in another iterator."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.seconds = 0.0
        self._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.seconds += time.perf_counter() - begin


def _timed(does: Callable[[], None]) -> float:
    import torch

    begin = time.perf_counter()
    does()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
