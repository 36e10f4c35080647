"""Time and peak memory of conversion on random bfloat16 weights, beside a copy by safetensors.

The sides run in turns. The bench needs about four times the size of the model under --dir and
removes its files."""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vrl.errors import UserError

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def add_options(parser: argparse.ArgumentParser) -> None:
    model = ROOT / "configs" / "models" / "qwen2.5-vl-3b.json"
    parser.add_argument("--model", type=Path, default=model, help="config.json of the model")
    parser.add_argument(
        "--dir",
        type=Path,
        default=None,
        help="folder with room for the files (default: the temporary folder)",
    )


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for both directions, `verify` and the copy, each measured in its own process."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        size = random_checkpoint(arguments.model, folder / "hf")
        runs: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.rounds):
            for step, command in _convert_steps(folder).items():
                runs.setdefault(step, []).append(_measured(command))
                shutil.rmtree(folder / "copy", ignore_errors=True)
            for made in ("megatron", "back"):
                shutil.rmtree(folder / made)
        base = statistics.median(seconds for seconds, _ in runs["safetensors alone"])
        for step, timings in runs.items():
            seconds = statistics.median(s for s, _ in timings)
            yield {
                "bench": "convert",
                "step": step,
                "model": arguments.model.stem,
                "gib": size / 2**30,
                "seconds": seconds,
                "ratio": seconds / base,
                "peak_gib": max(peak for _, peak in timings),
                "rounds": len(timings),
            }


def _convert_steps(folder: Path) -> dict[str, list[str]]:
    hf, megatron, back = (str(folder / name) for name in ("hf", "megatron", "back"))
    tool = str(ROOT / "tools" / "convert_checkpoint.py")
    return {
        "safetensors alone": ["-c", _COPY, hf, str(folder / "copy")],
        "hf-to-megatron": [tool, "hf-to-megatron", hf, megatron],
        "megatron-to-hf": [tool, "megatron-to-hf", megatron, back],
        "verify": [tool, "verify", hf, back],
    }


# Read every shard and write it again, the way a converter that does nothing would.
_COPY = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
for shard in sorted(source.glob("*.safetensors")):
    save_file(load_file(shard), target / shard.name)
"""


def _measured(command: Sequence[str]) -> tuple[float, float]:
    """Seconds of a Python command, and the peak resident memory of its process in GiB."""
    os.sync()  # so that this command does not wait for earlier writes
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed; its output is above.")
    return seconds, _peak_bytes(usage) / 2**30


def _peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * 1024  # Linux counts KiB


def random_checkpoint(config: Path, directory: Path) -> int:
    """Write a checkpoint of random bfloat16 weights, tensor by tensor; return its bytes."""
    import torch

    from megatron_vrl.checkpoint.hf_reader import HFCheckpointWriter
    from megatron_vrl.models.architecture import read_architecture
    from megatron_vrl.models.weight_map import hf_shapes

    directory.mkdir(parents=True)
    shutil.copy(config, directory / "config.json")
    writer = HFCheckpointWriter(directory)
    size = 0
    for name, shape in hf_shapes(read_architecture(config)).items():
        words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
        writer.add(name, words.view(torch.bfloat16))
        size += 2 * words.numel()
    writer.close()
    return size
