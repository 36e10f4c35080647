"""Scope of a run: its metric files are open and its directory is locked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vrl.context import RunContext
from megatron_vrl.errors import UserError
from megatron_vrl.observe.metrics import Phase
from megatron_vrl.observe.sinks import Sinks, open_sinks
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.process.run_lock import Owner


@contextmanager
def run_scope(ctx: RunContext, owner: Owner, resume: tuple[Phase, int] | None) -> Iterator[Sinks]:
    """Open the metric sinks, and at the end close them and release the run directory.

    Every rank enters it. `resume`: first (phase, step) whose rows are written again; None: all.
    A UserError, which all ranks raise together, is raised after closing. On any other error
    nothing is closed, since the other ranks may not come to it.
    """
    cfg, out_dir = ctx.cfg, Path(ctx.cfg.run.out_dir)
    with raise_on_all_ranks(ctx.mesh):
        sinks = open_sinks(
            out_dir,
            cfg.observe,
            cfg.model_dump(mode="json"),
            out_dir.name,
            rank=ctx.mesh.rank,
            resume=resume,
        )
    failure: UserError | None = None
    try:
        yield sinks
    except UserError as error:
        failure = error
    # torchrun kills all ranks when one has ended, and closing takes time: close together.
    with raise_on_all_ranks(ctx.mesh):
        sinks.close()
        owner.release()
    if failure is not None:
        raise failure
