"""Write the metrics of a step and of an evaluation.

Rank 0 writes and every rank calls, so that all ranks raise together if the disk is full.
"""

from megatron_vrl.context import RunContext
from megatron_vrl.evaluation.during_training import evaluate
from megatron_vrl.observe.metrics import Phase, StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import Sample


def record(ctx: RunContext, sinks: Sinks, metrics: StepMetrics) -> None:
    """Write one row of metrics. Raises UserError on every rank if the disk is full."""
    with raise_on_all_ranks(ctx.mesh):
        sinks.write(metrics)


def evaluate_dev(
    ctx: RunContext, state: RunState, sinks: Sinks, dev: list[Sample], during: Phase
) -> dict[str, float]:
    """Evaluate the split `dev` after a step whose row is written, and write the metrics.

    A run that ends before the row of the evaluation is written repeats it when it resumes.
    """
    state.evaluating = "dev"
    with ctx.clock("evaluate"):
        metrics = evaluate(ctx, dev, state.version, state.step)
    spent = ctx.clock.take()
    state.add_seconds(spent)
    row = StepMetrics(
        phase="eval",
        step=state.step,
        values=metrics,
        seconds=spent,
        split="dev",
        during=during,
    )
    record(ctx, sinks, row)
    state.evaluating = ""
    return metrics
