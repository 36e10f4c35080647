"""A run that is asked to stop: SIGUSR1, which schedulers send some time before a job's limit.

The step under way is finished, a checkpoint is written, and the processes end with exit code 0; the
same command goes on from there. One rank that heard it is enough.

The signal is blocked and looked for, not handled: Slurm sends it to every process of a job step,
and a handler would be the rank's alone, while its children (decoders, the writers of a checkpoint)
would end of it. They inherit the block.
"""

import signal

import torch
import torch.distributed as dist

from megatron_vrl.errors import StopRequested
from megatron_vrl.parallel.mesh import Mesh


def stop_if_asked(mesh: Mesh, step: int) -> None:
    """Raises StopRequested on every rank if any has heard the signal. Every rank calls it."""
    heard = signal.SIGUSR1 in signal.sigpending()
    flag = torch.tensor(float(heard), device=mesh.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if flag.item():
        raise StopRequested(
            f"Stopped after step {step} as asked; the same command goes on from its checkpoint."
        )
