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
    """Score the split `dev` inside a phase; its seconds belong to the step that asked."""
    with ctx.clock("evaluate"):
        metrics = evaluate(ctx, dev, state.version)
    row = StepMetrics(phase="eval", step=state.step, values=metrics, split="dev", during=during)
    record(ctx, sinks, row)
    return metrics
