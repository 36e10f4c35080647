"""Load what a run starts with or resumes from.

`restore` decides once which of three cases holds, and reads each file of weights once:

    case          newest checkpoint            loads
    FRESH         none                         weights of model.checkpoint
    STAGE START   at step 0 of its stage       its weights
    MID-STAGE     at a later step              its weights and optimizer state

With a KL term, a run in the middle of GRPO also loads the weights that GRPO started from, into the
reference model. Example: a run that was killed after step 23 of GRPO, with a checkpoint at step 20,
loads grpo-0-000000 into the reference and grpo-0-000020 into policy and optimizer.
"""

import sys
from pathlib import Path

from megatron_vrl.checkpoint.checkpoint import read_state
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.config import Optimizer, RunConfig
from megatron_vrl.context import PolicyContext
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.policy.policy import Policy
from megatron_vrl.trainer.state import RunState, checkpoint_name


def restore(cfg: RunConfig, trained: PolicyContext) -> RunState:
    """Load the policy and return the state of the run. Every rank calls it.

    In the middle of a stage the policy has its optimizer afterwards. Otherwise the stage creates
    it. Raises CheckpointError on every rank.
    """
    policy, saver = trained.policy, trained.saver
    found = _newest(saver, trained.mesh)
    if found is None:
        saver.load_weights(cfg.model.checkpoint)
        return RunState()
    state = RunState(**read_state(found))
    if state.step == 0:
        saver.load_weights(found)
    else:
        _resume_stage(cfg, state, policy, saver, found)
    return state


def _newest(saver: Saver, mesh: Mesh) -> Path | None:
    """Return the newest sound checkpoint. Rank 0 prints which ones were passed over."""
    found, damaged = saver.newest_sound()
    if mesh.rank == 0:
        for sentence in damaged:
            print(f"warning: {sentence}", file=sys.stderr)
    return found


def _resume_stage(
    cfg: RunConfig, state: RunState, policy: Policy, saver: Saver, found: Path
) -> None:
    """Load the reference model if there is one, then policy and optimizer."""
    if state.stage == "grpo" and cfg.algorithm.kl > 0:
        saver.load_weights(saver.root / checkpoint_name("grpo", state.attempt, 0))
        policy.keep_reference()
    optimizer, num_steps = _phase(cfg, state)
    policy.start_phase(optimizer, num_steps)
    saver.load_checkpoint(found)


def _phase(cfg: RunConfig, state: RunState) -> tuple[Optimizer, int]:
    """Return the optimizer settings and the number of steps of the current stage."""
    if state.stage == "sft":
        return cfg.sft.optimizer, cfg.sft.steps
    return cfg.grpo.optimizer, cfg.grpo.steps
