"""What a loop writes down. Rank 0 writes, every rank calls: a full disk ends them all together."""

from megatron_vrl.context import RunContext
from megatron_vrl.evaluation.during_training import evaluate
from megatron_vrl.observe.metrics import Phase, StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import VideoSample


def record(ctx: RunContext, sinks: Sinks, metrics: StepMetrics) -> None:
    with raise_on_all_ranks(ctx.mesh):
        sinks.write(metrics)


def evaluate_dev(
    ctx: RunContext, state: RunState, sinks: Sinks, dev: list[VideoSample], during: Phase
) -> dict[str, float]:
    """Score the split `dev` inside a phase, after the row of its step is written.

    A run that ends before the row of the evaluation is written makes it again when it goes on.
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
