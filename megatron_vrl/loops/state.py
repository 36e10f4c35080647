"""Where a run stands: what a restarted process needs besides weights and optimizer."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megatron_vrl.build import Parts
from megatron_vrl.config import Optimizer
from megatron_vrl.observe.files import full_disk_named
from megatron_vrl.training.checkpoint import (
    latest,
    load_checkpoint,
    load_weights,
    read_state,
    save_latest,
)

Stage = Literal["base", "sft", "grpo", "done"]


@dataclass(slots=True, kw_only=True)
class RunState:
    stage: Stage = "base"  # the part of the job that comes next or is under way
    step: int = 0  # finished steps of it
    stream: int = 0  # samples handed out in it
    attempt: int = 0  # restarts of the warm-up so far
    version: int = 0  # updates since the start: names the weights
    results: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of each part of the job, all tries

    def begin(self, stage: Stage) -> None:
        self.stage, self.step, self.stream = stage, 0, 0

    def add_seconds(self, spent: dict[str, float]) -> None:
        for name, value in spent.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


def checkpoint_root(parts: Parts) -> Path:
    return Path(parts.cfg.run.out_dir) / "checkpoints"


def save(parts: Parts, state: RunState) -> None:
    """Checkpoint the run as it stands. Every rank calls it."""
    with parts.clock("checkpoint"):
        name = f"{state.stage}-{state.attempt}-{state.step:06d}"
        root, keep = checkpoint_root(parts), parts.cfg.checkpoint.keep
        with full_disk_named(root):
            save_latest(root, name, parts.policy, asdict(state), parts.published_dir, keep)


def restored(out_dir: str) -> RunState:
    """The state of the newest checkpoint of this run, or that of a run that has not begun."""
    found = latest(Path(out_dir) / "checkpoints")
    return RunState(**read_state(found)) if found else RunState()


def start_phase(parts: Parts, state: RunState, cfg: Optimizer, num_steps: int) -> None:
    """Give the policy this phase's optimizer, and if the phase is under way its state."""
    parts.policy.start_phase(cfg, num_steps)
    found = latest(checkpoint_root(parts))
    if state.step > 0 and found:
        load_checkpoint(found, parts.policy)


def load_stage_weights(parts: Parts, state: RunState) -> None:
    """Weights of the newest checkpoint, where a stage is about to begin."""
    found = latest(checkpoint_root(parts))
    if state.stage != "base" and found:
        load_weights(found, parts.policy)
