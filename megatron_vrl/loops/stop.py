"""A run that is asked to stop: SIGUSR1, which schedulers send some time before a job's limit.

The step under way is finished, a checkpoint is written, and the processes end with exit code 0; the
same command goes on from there. One rank that heard it is enough.
"""

import signal

import torch
import torch.distributed as dist

from megatron_vrl.errors import StopRequested
from megatron_vrl.parallel.mesh import Mesh

_heard = False


def listen() -> None:
    """From now on the signal asks to stop. Called once, in the main thread."""
    signal.signal(signal.SIGUSR1, _hear)


def _hear(*_: object) -> None:
    global _heard
    _heard = True


def stop_if_asked(mesh: Mesh, step: int) -> None:
    """Raises StopRequested on every rank if any has heard the signal. Every rank calls it."""
    flag = torch.tensor(float(_heard), device=mesh.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if flag.item():
        raise StopRequested(
            f"Stopped after step {step} as asked; the same command goes on from its checkpoint."
        )
