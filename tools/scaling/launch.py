"""Start the ranks of a cell on this node, under launch/torchrun.py."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.pipeline_split import check_divides
from megatron_vrl.parallel.mesh import check_layout
from scaling.grid import Cell, Study
from scaling.predict import model_of

ROOT = Path(__file__).resolve().parents[2]
MODEL_PATIENCE_S = 1800  # for node 0, which makes the models
STOP_S = 60  # torchrun itself waits 30 s for its ranks
PORTS = 64  # a cell meets at a port of its own: the one before may still be closing


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    count: int
    rank: int  # of this node
    per_node: int  # ranks, at most
    address: str  # of node 0
    port: int
    units: int  # cores of a node, or GPUs: what its ranks compute on

    def of(self, ranks: int) -> int:
        """Return how many nodes a cell uses, counted from node 0. Raise ConfigError if too few."""
        nodes = math.ceil(ranks / self.per_node)
        if nodes > self.count or ranks % nodes:
            raise ConfigError(
                f"{counted(ranks, 'rank')} cannot run on {counted(self.count, 'node')} of "
                f"{self.per_node}: change --nproc, --nnodes or the layout."
            )
        return nodes


def check_cell(cell: Cell, study: Study, arch: Architecture, nodes: Nodes) -> None:
    """Raise ConfigError for a cell that cannot run here."""
    layout = cell.layout
    nodes.of(layout.ranks)
    if cell.prompts < layout.data:
        raise ConfigError(
            f"work.prompts={cell.prompts} is less than the {layout.data} data ranks of layout "
            f"{layout.name}: raise it."
        )
    check_layout(layout.parallel(), layout.ranks)
    check_divides(arch, model_of(study.work), layout.parallel())


def model_path(size: str, given: Mapping[str, Any] | str, out: Path, nodes: Nodes) -> Path:
    """Return a checkpoint or an architecture's JSON. Node 0 makes a tiny model that is absent."""
    if isinstance(given, str):
        path = Path(given)
        read_architecture(path)  # raises CheckpointError
        return path
    path = out / "models" / size
    options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    if not path.exists() and nodes.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        tool = [sys.executable, str(ROOT / "tools" / "make_tiny_model.py"), "--out", str(path)]
        made = subprocess.run([*tool, *options], capture_output=True, text=True)
        if made.returncode:
            raise ConfigError(f"grid.sizes.{size}: {sentence(made.stderr)}")
    until = time.monotonic() + MODEL_PATIENCE_S
    while not path.exists():
        if time.monotonic() > until:
            raise ConfigError(f"Node 0 has not made {path}: is {out} on a shared file system?")
        time.sleep(1)
    return path


def launch(spec: Mapping[str, Any], ranks: int, number: int, nodes: Nodes, timeout_s: float) -> Any:
    """Run this node's ranks of a cell. Return the cell's results on node 0 and None on the others.

    A node that the cell does not use starts nothing. `number` is unique to the cell. Raise
    ConfigError with the sentence of the ranks.
    """
    used = nodes.of(ranks)
    if nodes.rank >= used:
        return None
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), *_meeting(used, number, nodes)]
    command += ["--nproc-per-node", str(ranks // used)]
    command += [str(ROOT / "tools" / "scaling_study.py"), "--rank", json.dumps(spec)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"} | os.environ,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"not finished within rounds.timeout_s={timeout_s:g}: raise it."
        ) from None
    finally:
        _stop(process)  # unless it has ended
    if process.returncode:
        raise ConfigError(sentence(err))
    if nodes.rank:
        return None
    return json.loads(next(line for line in out.splitlines() if line.startswith("{")))


def _stop(process: subprocess.Popen[str]) -> None:
    """End the launcher, which ends its ranks; kill its process group after STOP_S."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _meeting(used: int, number: int, nodes: Nodes) -> list[str]:
    if used == 1:
        return ["--standalone"]
    timeout = f"join_timeout={MODEL_PATIENCE_S},is_host={int(nodes.rank == 0)}"
    endpoint = f"{nodes.address}:{nodes.port + number % PORTS}"
    meeting = ["--nnodes", str(used), "--rdzv-backend", "c10d", "--rdzv-id", f"cell-{number}"]
    meeting += ["--rdzv-endpoint", endpoint, "--rdzv-conf", timeout]
    local = os.environ.get("LOCAL_ADDR")
    return meeting + (["--local-addr", local] if local else [])


def sentence(stderr: str) -> str:
    """Return the error sentence in the output of a failed process, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    ours = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    # A rank's comes before its launcher's, which only says that one has failed.
    return (ours or errors or lines[-1:] or ["ended without any output"])[0]


def load() -> float:
    """Return the load average of this node over the last minute."""
    return os.getloadavg()[0]
