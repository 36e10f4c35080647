"""Run by torchrun with two processes: `checkpoint_worker.py CHECKPOINT CONVERTED DIRECTORY`.

Starts from CONVERTED, the Megatron form of CHECKPOINT, in every layout. Trains two steps with data
parallel 2, saves, and takes the third step after loading in every layout of `RESHARDED`. Writes to
DIRECTORY/NAME.pt what each third step led to, and for the layouts of `SAVED` what it had loaded to
the checkpoint DIRECTORY/saved/NAME.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_vrl.checkpoint.checkpoint import (
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
)
from megatron_vrl.checkpoint.hf_load import hf_tensors
from megatron_vrl.checkpoint.hf_reader import HFCheckpoint
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.config import Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy.policy import Policy
from tests.tiny import GROUPS, micro_batches, token_loss

OPTIMIZER = Optimizer(lr=1e-3, betas=(0.9, 0.95), warmup_steps=4)
RESHARDED = {
    "dp2": Parallel(),
    "whole": Parallel(distributed_optimizer=False),
    "tp2": Parallel(tensor=2),
    "pp2": Parallel(pipeline=2),
    "vpp2": Parallel(pipeline=2, virtual=2),
}
SAVED = ("whole", "tp2", "vpp2")


def started(checkpoint: Path, converted: Path, parallel: Parallel) -> Policy:
    mesh = init_mesh(parallel, seed=1)
    arch = read_architecture(checkpoint)
    policy = Policy(arch, Model(checkpoint=str(checkpoint), dtype="float32"), parallel, mesh)
    load_weights(converted, policy)
    source = HFCheckpoint(checkpoint, arch)
    for name, tensor in hf_tensors(policy.chunks):
        assert torch.equal(tensor, source.tensor(name)), name
    policy.start_phase(OPTIMIZER, num_steps=8)
    return policy


def step(policy: Policy, done: int) -> dict[str, Any]:
    batches = micro_batches(GROUPS, policy.mesh)
    update = policy.update(batches, token_loss, Distribution(), done)
    weights = {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}
    return {"loss": update.loss, "grad_norm": update.grad_norm, "weights": weights}


def main(checkpoint: Path, converted: Path, directory: Path) -> None:
    policy = started(checkpoint, converted, Parallel())
    saver = Saver(directory / "run", policy, checkpoint, keep=1)
    saver.save("step-0", {"step": 0})
    step(policy, 0)
    saver.poll()
    step(policy, 1)
    saver.save("step-2", {"step": 2})
    torch.save(step(policy, 2), directory / "unbroken.pt")  # while step-2 is being written
    saver.finish()
    close_mesh()
    for name, parallel in RESHARDED.items():
        policy = started(checkpoint, converted, parallel)
        load_checkpoint(directory / "run" / "step-2", policy)
        assert read_state(directory / "run" / "step-2") == {"step": 2}
        if name in SAVED:
            save_checkpoint(directory / "saved" / name, policy, {}, checkpoint)
        result = step(policy, 2)
        if policy.mesh.rank == 0:
            torch.save(result, directory / f"{name}.pt")
        close_mesh()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
