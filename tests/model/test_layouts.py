"""Every layout equals the single process: loss, every gradient, and the weights after updates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import published_model, save

ROOT = Path(__file__).parents[2]

LAYOUTS = {
    "dp2": (2, ["distributed_optimizer=false"]),
    "dp2-distributed-optimizer": (2, []),
    "tp2": (2, ["tensor=2", "distributed_optimizer=false"]),
    "tp2-sp": (2, ["tensor=2", "sequence=true", "distributed_optimizer=false"]),
    "pp2": (2, ["pipeline=2", "distributed_optimizer=false"]),
    "recompute": (1, ["recompute=full", "distributed_optimizer=false"]),
    "plain": (1, ["layout=plain", "distributed_optimizer=false"]),
    "tp2-sp-pp2-distributed-optimizer": (4, ["tensor=2", "sequence=true", "pipeline=2"]),
}


def _run(checkpoint: Path, out: Path, processes: int, arguments: list[str]) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "tests.model.layout_worker"]
    done = subprocess.run(
        [*command, str(checkpoint), str(out), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def single(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    checkpoint = save(published_model(tied=request.param), directory / "hf")
    return checkpoint, _run(checkpoint, directory / "one.pt", 1, ["distributed_optimizer=false"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(single, tmp_path, layout):
    checkpoint, one = single
    processes, arguments = LAYOUTS[layout]
    many = _run(checkpoint, tmp_path / "many.pt", processes, arguments)
    for name in ("loss", "grad_norm", "entropy"):
        torch.testing.assert_close(
            torch.tensor(many[name]), torch.tensor(one[name]), rtol=1e-5, atol=1e-6
        )
    for name, grad in many.get("grads", {}).items():
        error = (grad - one["grads"][name]).norm() / one["grads"][name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
    for name, weight in many["weights"].items():
        error = (weight - one["weights"][name]).norm() / one["weights"][name].norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e} after 3 updates"
