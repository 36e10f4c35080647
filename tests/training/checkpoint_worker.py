"""Run by torchrun with two processes: `checkpoint_worker.py CHECKPOINT DIRECTORY`.

Trains two steps with data parallel 2, saves, and takes the third step after loading in every
layout of `RESHARDED`. Writes to DIRECTORY/NAME.pt what each third step led to.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_vrl.config import Model, Optimizer, Parallel
from megatron_vrl.model.architecture import read_architecture
from megatron_vrl.model.head import Distribution
from megatron_vrl.model.weights import load_published, published_tensors
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.training.checkpoint import load_checkpoint, read_state, save_latest
from megatron_vrl.training.policy import Policy
from tests.tiny import GROUPS, micro_batches, token_loss

OPTIMIZER = Optimizer(lr=1e-3, betas=(0.9, 0.95), warmup_steps=4)
RESHARDED = {"dp2": Parallel(), "tp2": Parallel(tensor=2), "pp2": Parallel(pipeline=2)}


def started(checkpoint: Path, parallel: Parallel) -> Policy:
    mesh = init_mesh(parallel, seed=1)
    arch = read_architecture(checkpoint)
    policy = Policy(arch, Model(checkpoint=str(checkpoint), dtype="float32"), parallel, mesh)
    load_published(policy.chunks, checkpoint)
    policy.start_phase(OPTIMIZER, num_steps=8)
    return policy


def step(policy: Policy, done: int) -> dict[str, Any]:
    batches = micro_batches(GROUPS, policy.mesh)
    update = policy.update(batches, token_loss, Distribution(), done)
    weights = {name: tensor.clone() for name, tensor in published_tensors(policy.chunks)}
    return {"loss": update.loss, "grad_norm": update.grad_norm, "weights": weights}


def main(checkpoint: Path, directory: Path) -> None:
    policy = started(checkpoint, Parallel())
    save_latest(directory / "run", "step-0", policy, {"step": 0}, checkpoint, keep=1)
    step(policy, 0)
    step(policy, 1)
    save_latest(directory / "run", "step-2", policy, {"step": 2}, checkpoint, keep=1)
    torch.save(step(policy, 2), directory / "unbroken.pt")
    close_mesh()
    for name, parallel in RESHARDED.items():
        policy = started(checkpoint, parallel)
        load_checkpoint(directory / "run" / "step-2", policy)
        assert read_state(directory / "run" / "step-2") == {"step": 2}
        result = step(policy, 2)
        if policy.mesh.rank == 0:
            torch.save(result, directory / f"{name}.pt")
        close_mesh()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
