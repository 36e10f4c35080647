"""A run that is asked to stop, by SIGUSR1, Ctrl-C or SIGTERM (see megatron_vrl/process/signals.py).

The step under way is finished, or the batch of an evaluation; a checkpoint is written, and the
processes end with exit code 0. The same command goes on from there, and makes an evaluation that
was not finished again. One rank that heard it is enough.
"""

import torch
import torch.distributed as dist

from megatron_vrl.errors import RunInUse, StopRequested
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.process.run_lock import ownership_lost
from megatron_vrl.process.signals import stop_asked


def stop_if_asked(mesh: Mesh, step: int, *, evaluating: bool = False) -> None:
    """Raises StopRequested on every rank if any has heard the signal, RunInUse if a run on another
    host has taken the run directory. Every rank calls it.

    `step`: the last that is finished. `evaluating`: between two batches of an evaluation after it.
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
