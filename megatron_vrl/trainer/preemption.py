"""Stop a run on SIGUSR1, Ctrl-C or SIGTERM (see megatron_vrl/process/signals.py).

The current step, or the current batch of an evaluation, is finished, a checkpoint is written, and
all processes exit with code 0. The same command resumes from the checkpoint and repeats an
evaluation that was not finished. One rank that received the signal stops all ranks.
"""

import torch
import torch.distributed as dist

from megatron_vrl.errors import RunInUse, StopRequested
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.process.run_lock import ownership_lost
from megatron_vrl.process.signals import stop_asked


def stop_if_asked(mesh: Mesh, step: int, *, evaluating: bool = False) -> None:
    """Raise StopRequested on every rank if any rank has received a signal. Every rank calls it.

    Raises RunInUse if a run on another host has taken the run directory. `step`: last finished
    step. `evaluating`: the call is between two batches of an evaluation after it.
    """
    flags = torch.tensor([float(stop_asked()), float(ownership_lost())], device=mesh.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    asked, lost = flags.tolist()
    if lost:
        raise RunInUse(
            f"Ended after step {step}: a run on another host has taken the run directory, since "
            "this one showed no sign of life for some time."
        )
    if asked:
        raise StopRequested(_sentence(step, evaluating))


def _sentence(step: int, evaluating: bool) -> str:
    if not evaluating:
        return f"Stopped after step {step} as asked; the same command goes on from its checkpoint."
    if step == 0:
        return (
            "Stopped before the first step, in an evaluation, as asked; the same command begins "
            "with it again."
        )
    return (
        f"Stopped after step {step}, in an evaluation, as asked; the same command goes on from the "
        "checkpoint of that step and makes the evaluation again."
    )
