"""Update of a tiny model in bfloat16, asynchronous save, load, and the next update again.

Prints one row. `resume_difference` is the largest difference of a weight after the second update,
between the run that went on while the checkpoint was written and a policy that loaded it.
`float32_difference` is the mean distance of log-probs from those of the same weights in float32.
"""

import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benches.ops import architecture, batches_of, make_policy

from gpu_checks.parts import MODEL_3B
from megatron_vrl.algorithms import token_loss
from megatron_vrl.checkpoint.hf_load import hf_tensors
from megatron_vrl.checkpoint.saver import Saver, latest
from megatron_vrl.config import Algorithm, Parallel
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.policy import Policy
from megatron_vrl.process.entry import run_program

SIZES = argparse.Namespace(frames=4, height=112, width=112, answer_tokens=8, group=4)
FURTHEST = 1e-3  # of resume_difference; 0 where kernels repeat every bit


def main() -> None:
    silence_libraries()
    torch.manual_seed(1)
    mesh = init_mesh(Parallel(), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(MODEL_3B, Path(folder) / "config.json")
        row = _measured(mesh, Path(folder))
    close_mesh()
    print(json.dumps({"bench": "tiny update", "device": str(mesh.device), **row}))
    if not row["resume_difference"] <= FURTHEST:
        raise CheckpointError(
            f"The resumed update differs by {row['resume_difference']:.1e}: more than {FURTHEST}."
        )


def _measured(mesh: Mesh, folder: Path) -> dict[str, Any]:
    policy, batches = _policy(mesh, "bfloat16"), batches_of(architecture(), mesh, SIZES)
    loss = partial(token_loss, cfg=Algorithm(kl=0.0))
    rounding = _float32_difference(mesh, policy, batches)
    updates = [policy.update(batches, loss, Distribution(), 0)]
    saver = Saver(folder / "run", policy, folder, keep=1)
    saver.save("step-1", {"step": 1})
    updates.append(policy.update(batches, loss, Distribution(), 1))  # while the writer writes
    saver.finish()
    resumed, checkpoint = _policy(mesh, "bfloat16"), latest(folder / "run")
    assert checkpoint is not None
    Saver(folder / "run", resumed, folder, keep=1).load_checkpoint(checkpoint)
    updates.append(resumed.update(batches, loss, Distribution(), 1))
    assert all(update.applied for update in updates), updates
    return {
        "grad_norm": updates[0].grad_norm,
        "float32_difference": rounding,
        "resume_difference": _furthest(policy, resumed),
    }


def _policy(mesh: Mesh, dtype: str) -> Policy:
    return make_policy(architecture(), mesh, argparse.Namespace(dtype=dtype, recompute="none"))


def _float32_difference(mesh: Mesh, policy: Policy, batches: list[Any]) -> float:
    exact = _policy(mesh, "float32")
    for theirs, ours in zip(exact.chunks, policy.chunks, strict=True):
        theirs.load_state_dict(ours.state_dict())
    (wanted,), (rounded,) = (one.logprobs(batches, Distribution()) for one in (exact, policy))
    assert wanted is not None and rounded is not None
    return float((wanted - rounded).abs().mean())


def _furthest(policy: Policy, other: Policy) -> float:
    """Return the largest difference of a weight."""
    pairs = zip(hf_tensors(policy.chunks), hf_tensors(other.chunks), strict=True)
    return max(
        float((ours.float() - theirs.float()).abs().max()) for (_, ours), (_, theirs) in pairs
    )


if __name__ == "__main__":
    run_program(main)
