"""State of a run beside its weights and optimizer, and the checkpoints that hold it.

Stages of a job:

    base -> sft -> grpo -> done

A stage ends with `begin` of the next one, which sets `step` to 0. A checkpoint is written in the
middle of a stage every checkpoint.every_steps steps, and at step 0 of grpo and done. Example: a
checkpoint with stage="grpo" and step=20 resumes at step 21 of GRPO.
"""

import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from megatron_vrl.checkpoint.checkpoint import read_state
from megatron_vrl.checkpoint.saver import latest
from megatron_vrl.context import RunContext
from megatron_vrl.errors import CheckpointError
from megatron_vrl.observe.metrics import Phase
from megatron_vrl.trainer.preemption import stop_if_asked

Stage = Literal["base", "sft", "grpo", "done"]


@dataclass(slots=True, kw_only=True)
class RunState:
    """State of a run, as state.json of a checkpoint holds it."""

    stage: Stage = "base"  # current stage; after its last step the next one, at step 0
    step: int = 0  # finished steps of the stage
    evaluating: Literal["", "dev", "stage"] = ""  # evaluation after `step` that is not finished
    stream: int = 0  # samples drawn from the stream of the stage
    in_flight: list[int] = field(default_factory=list)  # stream positions of in-flight requests
    bad_samples: int = 0  # samples drawn and replaced because of their videos
    selections: list[list[int]] = field(default_factory=list)  # [epoch, first stream position]
    attempt: int = 0  # restarts of SFT
    best_step: int = 0  # of SFT, with the best evaluation so far (sft.load_best_at_end); 0: none
    best_value: float = 0.0  # of sft.stop_metric in that evaluation
    version: int = 0  # training steps since the start; identifies the weights
    results: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by activity, of all starts

    @classmethod
    def of_json(cls, values: dict[str, Any], path: Path) -> Self:
        """Return the state that `values`, the content of `path`, describes.

        Raises CheckpointError if another version of this package wrote it.
        """
        names = {each.name for each in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise CheckpointError(
                f"{path} has fields that this version does not know ({', '.join(unknown)}): "
                "another version wrote it. Resume with that version, or start a run from its "
                "weights (mvrl convert)."
            )
        return cls(**values)

    def begin(self, stage: Stage) -> None:
        """Go to step 0 of `stage`."""
        self.stage, self.step, self.evaluating, self.stream = stage, 0, "", 0
        self.in_flight, self.selections, self.bad_samples = [], [], 0

    @property
    def next_row(self) -> tuple[Phase, int] | None:
        """(phase, step) of the first metrics row that a resumed run writes again; None: all."""
        if self.stage == "base":
            return None
        return ("grpo", sys.maxsize) if self.stage == "done" else (self.stage, self.step + 1)

    def add_seconds(self, spent: dict[str, float]) -> None:
        for name, value in spent.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


def checkpoint_name(stage: Stage, attempt: int, step: int) -> str:
    """Return the name of a checkpoint: "grpo-0-000020" is step 20 of GRPO."""
    return f"{stage}-{attempt}-{step:06d}"


def save(ctx: RunContext, state: RunState) -> None:
    """Begin a checkpoint of the run in the background. Every rank calls it."""
    with ctx.clock("checkpoint"):
        ctx.saver.save(
            checkpoint_name(state.stage, state.attempt, state.step),
            asdict(state),
            pinned=_pinned(ctx, state),
        )


def _pinned(ctx: RunContext, state: RunState) -> str:
    """Return the name of the checkpoint that a later step of the stage reads, or ""."""
    if state.stage == "sft":
        return checkpoint_name("sft", state.attempt, state.best_step) if state.best_step else ""
    is_read = ctx.cfg.algorithm.kl > 0 and not ctx.cfg.model.lora.rank
    return checkpoint_name("grpo", state.attempt, 0) if is_read else ""


def save_if_due(ctx: RunContext, state: RunState) -> None:
    """Commit a checkpoint that has been written, and begin the next if one is due.

    Every rank calls it after each step. Raises StopRequested if the run was asked to stop; the
    caller then saves.
    """
    with ctx.clock("checkpoint"):
        ctx.saver.poll()
    stop_if_asked(ctx.mesh, state.step)
    if state.step % ctx.cfg.checkpoint.every_steps == 0:
        save(ctx, state)


def finish_saving(ctx: RunContext) -> None:
    """Wait until the checkpoint in flight is committed. Every rank calls it."""
    with ctx.clock("checkpoint"):
        ctx.saver.finish()


def is_done(out_dir: str) -> bool:
    """Return whether the newest checkpoint of a run is that of a finished job."""
    checkpoint = latest(Path(out_dir) / "checkpoints")
    try:
        return checkpoint is not None and read_state(checkpoint)["stage"] == "done"
    except (CheckpointError, KeyError):
        return False  # `restore` names the damage
