"""Run by torchrun: three updates of a tiny model in one layout; writes what every layout must share.

Usage: layout_worker.py CHECKPOINT OUT [parallel.key=value ...]
"""

import sys

import numpy as np
import torch

from megatron_vrl.batching.pack import Answer, Group, as_plain, pack
from megatron_vrl.config import Model, Optimizer, Parallel
from megatron_vrl.model.architecture import read_architecture
from megatron_vrl.model.head import Distribution
from megatron_vrl.model.weights import load_published, published_tensors
from megatron_vrl.parallel.mesh import init_mesh
from megatron_vrl.training.policy import Policy
from tests.tiny import prompt

GRIDS = [((3, 4, 4), 1.0), ((2, 2, 6), 2.0), ((1, 6, 4), 0.5), ((4, 2, 2), 1.5)]


def groups() -> list[Group]:
    rng = np.random.default_rng(3)
    return [
        Group(
            prompt=prompt(grid, seconds, seed),
            answers=tuple(
                Answer(
                    token_ids=rng.integers(0, 90, length),
                    advantage=float(rng.normal()),
                    engine_logprobs=np.zeros(length, dtype=np.float32),
                )
                for length in rng.integers(1, 9, 3)
            ),
        )
        for seed, (grid, seconds) in enumerate(GRIDS)
    ]


def token_loss(logprob, entropy, batch, reference):
    advantage = torch.from_numpy(batch.advantage)
    return -logprob * advantage - 0.01 * entropy, {"entropy": entropy, "logprob": logprob}


def main() -> None:
    checkpoint, out, *overrides = sys.argv[1:]
    layout = "shared"
    values = dict(pair.split("=") for pair in overrides)
    layout = values.pop("layout", "shared")
    recompute = values.pop("recompute", "none")
    parallel = Parallel.model_validate(values)
    mesh = init_mesh(parallel, seed=1)
    cfg = Model(checkpoint=checkpoint, dtype="float32", recompute=recompute)
    policy = Policy(read_architecture(checkpoint), cfg, parallel, mesh)
    load_published(policy.model, checkpoint)
    policy.start_phase(Optimizer(lr=1e-3, clip_grad=1.0), num_steps=3)

    everything = groups()
    weight = 1.0 / sum(group.num_targets for group in everything)
    mine = everything[mesh.data.rank :: mesh.data.size]
    batches = []
    for half in (mine[: len(mine) // 2], mine[len(mine) // 2 :]):
        batch = pack(as_plain(half) if layout == "plain" else half, pad_to=parallel.tensor)
        batch.weight[:] = weight
        batches.append(batch)
    result: dict = {"loss": [], "grad_norm": [], "entropy": []}
    for step in range(3):
        update = policy.update(batches, token_loss, Distribution(), step)
        result["loss"].append(update.loss)
        result["grad_norm"].append(update.grad_norm)
        result["entropy"].append(update.metrics["entropy"])
        if step == 0 and not parallel.distributed_optimizer:
            # clipping scaled the gradients in place by the same factor in every layout
            grads = published_tensors(policy.model, lambda p: p.main_grad)
            result["grads"] = {name: grad.clone() for name, grad in grads}
    result["weights"] = {name: t.clone() for name, t in published_tensors(policy.model)}
    if mesh.rank == mesh.world - 1:
        torch.save(result, out)


if __name__ == "__main__":
    main()
