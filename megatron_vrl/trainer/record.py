"""What a loop writes down. Rank 0 writes, every rank calls: a full disk ends them all together."""

from megatron_vrl.context import Parts
from megatron_vrl.evaluation.during_training import evaluate
from megatron_vrl.observe.metrics import Phase, StepMetrics
from megatron_vrl.observe.sinks import Sinks
from megatron_vrl.parallel.mesh import agreed
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import VideoSample


def record(parts: Parts, sinks: Sinks, metrics: StepMetrics) -> None:
    with agreed(parts.mesh):
        sinks.write(metrics)


def evaluate_dev(
    parts: Parts, state: RunState, sinks: Sinks, dev: list[VideoSample], during: Phase
) -> dict[str, float]:
    """Score the split `dev` inside a phase; its seconds belong to the step that asked."""
    with parts.clock("evaluate"):
        metrics = evaluate(parts, dev, state.version)
    row = StepMetrics(phase="eval", step=state.step, values=metrics, split="dev", during=during)
    record(parts, sinks, row)
    return metrics
