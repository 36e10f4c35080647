"""Load what a run starts with or resumes from.

`restore` decides which of three cases holds, and each file of weights is read once:

    case          newest checkpoint            loads
    FRESH         none                         weights of model.checkpoint
    STAGE START   at step 0 of its stage       its weights
    MID-STAGE     at a later step              its weights and optimizer state

With `model.lora` a checkpoint holds adapters: the weights of model.checkpoint, their frozen base,
are loaded before them in every case, and they are the reference model, too.

With a KL term, another run in the middle of GRPO also loads the weights that GRPO started from,
into the reference model. Example: a run that was killed after step 23 of GRPO, with a checkpoint
at step 20, loads grpo-0-000000 into the reference and grpo-0-000020 into policy and optimizer.

`restore` runs before the rollout engine starts, so that a damaged checkpoint costs no engine start.
`load_stage` runs after it: a fresh run creates optimizer and reference after the engine, too, and
vLLM sizes its KV cache by the memory that is free when it starts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_vrl.checkpoint.checkpoint import read_state
from megatron_vrl.checkpoint.layout import STATE
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.config import Optimizer, RunConfig
from megatron_vrl.context import PolicyContext
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.trainer.state import RunState, checkpoint_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    state: RunState
    pending: Path | None  # checkpoint that `load_stage` is to load; None: the weights are loaded


def restore(cfg: RunConfig, trained: PolicyContext) -> Restored:
    """Find the state of the run, and load the weights unless it is in the middle of a stage.

    Every rank calls it. Raises CheckpointError on every rank.
    """
    saver = trained.saver
    checkpoint = _newest(saver, trained.mesh)
    if checkpoint is None or cfg.model.lora.rank:
        saver.load_weights(cfg.model.checkpoint)
    if checkpoint is None:
        return Restored(state=RunState(), pending=None)
    state = RunState.of_json(read_state(checkpoint), checkpoint / STATE)
    if state.step > 0:
        return Restored(state=state, pending=checkpoint)
    saver.load_weights(checkpoint)
    return Restored(state=state, pending=None)


def load_stage(cfg: RunConfig, trained: PolicyContext, restored: Restored) -> None:
    """Load reference model, policy and optimizer of a run in the middle of a stage.

    Every rank calls it. At the start of a stage it does nothing: the stage creates its optimizer.
    """
    if restored.pending is None:
        return
    policy, saver, state = trained.policy, trained.saver, restored.state
    if state.stage == "grpo" and cfg.algorithm.kl > 0:
        if not cfg.model.lora.rank:
            saver.load_weights(saver.root / checkpoint_name("grpo", state.attempt, 0))
        policy.keep_reference()
    policy.start_phase(*_phase(cfg, state))
    saver.load_checkpoint(restored.pending)


def _newest(saver: Saver, mesh: Mesh) -> Path | None:
    """Return the newest sound checkpoint. Rank 0 prints which ones were passed over."""
    checkpoint, damaged = saver.newest_sound()
    if mesh.rank == 0:
        for sentence in damaged:
            print(f"warning: {sentence}", file=sys.stderr)
    return checkpoint


def _phase(cfg: RunConfig, state: RunState) -> tuple[Optimizer, int]:
    """Return the optimizer settings and the number of steps of the current stage."""
    if state.stage == "sft":
        return cfg.sft.optimizer, cfg.sft.steps
    return cfg.grpo.optimizer, cfg.grpo.steps
