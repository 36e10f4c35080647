"""Context manager of a run: opens its metric sinks, and at the end releases its directory."""

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
    """Yield the open metric sinks. At the end close them and release the run directory.

    Every rank enters the context. `owner` is this rank's lock on the run directory. `resume` is the
    first (phase, step) whose metric rows are written again; None writes all rows again. A UserError
    is raised after closing, since all ranks raise it together. On any other error nothing is
    closed: closing waits for all ranks, and the others may not have failed.
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
    # torchrun kills the other ranks when one has failed. So all ranks close before any raises.
    with raise_on_all_ranks(ctx.mesh):
        sinks.close()
        owner.release()
    if failure is not None:
        raise failure
