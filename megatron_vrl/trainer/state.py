"""Where a run stands: what a restarted process needs besides weights and optimizer."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megatron_vrl.checkpoint.checkpoint import load_checkpoint, load_weights, read_state
from megatron_vrl.checkpoint.saver import latest, newest_sound
from megatron_vrl.config import Optimizer
from megatron_vrl.context import RunContext
from megatron_vrl.errors import CheckpointError
from megatron_vrl.observe.metrics import Phase
from megatron_vrl.trainer.preemption import stop_if_asked

Stage = Literal["base", "sft", "grpo", "done"]


@dataclass(slots=True, kw_only=True)
class RunState:
    stage: Stage = "base"  # the part of the job that comes next or is under way
    step: int = 0  # finished steps of it
    evaluating: Literal["", "dev", "stage"] = ""  # what follows `step` and is not evaluated yet
    stream: int = 0  # samples handed out in it
    under_way: list[int] = field(default_factory=list)  # places of those not yet trained on
    bad_samples: int = 0  # of those handed out, replaced for their videos
    selections: list[list[int]] = field(default_factory=list)  # [epoch, place] each begins with
    attempt: int = 0  # restarts of the warm-up so far
    version: int = 0  # updates since the start: names the weights
    results: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of each part of the job, all tries

    def begin(self, stage: Stage) -> None:
        self.stage, self.step, self.evaluating, self.stream = stage, 0, "", 0
        self.under_way, self.selections, self.bad_samples = [], [], 0

    @property
    def next_row(self) -> tuple[Phase, int] | None:
        """(phase, step) from which a restarted run writes its metrics again; None: all of them."""
        if self.stage == "base":
            return None
        return ("grpo", sys.maxsize) if self.stage == "done" else (self.stage, self.step + 1)

    def add_seconds(self, spent: dict[str, float]) -> None:
        for name, value in spent.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


def save(ctx: RunContext, state: RunState) -> None:
    """Checkpoint the run as it stands, in the background. Every rank calls it."""
    with ctx.clock("checkpoint"):
        ctx.saver.save(
            _name(state.stage, state.attempt, state.step),
            asdict(state),
            pinned=_name("grpo", state.attempt, 0) if ctx.cfg.algorithm.kl > 0 else "",
        )


def save_if_due(ctx: RunContext, state: RunState) -> None:
    """After each step: publish what has been written by now, and begin the next if it is time.

    Raises StopRequested if the run was asked to stop; whoever runs the job then saves.
    """
    with ctx.clock("checkpoint"):
        ctx.saver.poll()
    stop_if_asked(ctx.mesh, state.step)
    if state.step % ctx.cfg.checkpoint.every_steps == 0:
        save(ctx, state)


def finish_saving(ctx: RunContext) -> None:
    """Wait until what was saved is on the disk. Every rank calls it."""
    with ctx.clock("checkpoint"):
        ctx.saver.finish()


def is_done(out_dir: str) -> bool:
    """Whether the newest checkpoint of this run says that nothing is left to do."""
    found = latest(Path(out_dir) / "checkpoints")
    try:
        return found is not None and read_state(found)["stage"] == "done"
    except (CheckpointError, KeyError):
        return False  # `restored` says what is wrong with it


def restored(ctx: RunContext) -> RunState:
    """The state of the newest sound checkpoint of this run, or that of one that has not begun.

    Every rank calls it; rank 0 names on stderr what was passed over.
    """
    found, damaged = newest_sound(ctx.saver.root, ctx.mesh)
    if ctx.mesh.rank == 0:
        for sentence in damaged:
            print(f"warning: {sentence}", file=sys.stderr)
    return RunState(**read_state(found)) if found else RunState()


def start_phase(ctx: RunContext, state: RunState, cfg: Optimizer, num_steps: int) -> None:
    """Give the policy this phase's optimizer, and if the phase is under way its state."""
    ctx.policy.start_phase(cfg, num_steps)
    found = latest(ctx.saver.root)
    if state.step > 0 and found:
        load_checkpoint(found, ctx.policy)


def keep_reference(ctx: RunContext, state: RunState) -> None:
    """Freeze a copy of the weights that GRPO began with, for the KL term. Every rank calls it
    before `start_phase`, which brings back the weights of a GRPO that is under way."""
    if state.step > 0:
        began = ctx.saver.root / _name("grpo", state.attempt, 0)
        load_weights(began, ctx.policy)
    ctx.policy.keep_reference()


def _name(stage: Stage, attempt: int, step: int) -> str:
    return f"{stage}-{attempt}-{step:06d}"


def load_stage_weights(ctx: RunContext, state: RunState) -> None:
    """Weights of the newest checkpoint, where a stage is about to begin."""
    found = latest(ctx.saver.root)
    if state.stage != "base" and found:
        load_weights(found, ctx.policy)
