"""Rollout files OUT/rollouts/rank-NNNN.jsonl.zst: every group with its answers and rewards.

Each rank appends the groups of its shard after each step. A run that resumes from a checkpoint
first removes the groups of later steps from all files, so that every group is there once, also if
the run was killed while it wrote or resumes with another number of ranks.
"""

from pathlib import Path

import msgspec

from megatron_vrl.context import RunContext
from megatron_vrl.parallel.mesh import raise_on_all_ranks, shard
from megatron_vrl.rollout.records import PATTERN, GroupRecord, GroupStatus, encode, record_of
from megatron_vrl.storage.compressed import FrameFile, keep_frames
from megatron_vrl.trainer.experience import RolloutBatch
from megatron_vrl.trainer.rollout_queue import sampling_spec

FOLDER = "rollouts"


class RolloutFiles:
    """Rollout file of this rank. Every rank calls its methods, in the same order."""

    def __init__(self, ctx: RunContext, steps_done: int) -> None:
        """Remove the groups of steps after `steps_done`."""
        self._ctx = ctx
        self._file: FrameFile | None = None
        mesh, folder = ctx.mesh, Path(ctx.cfg.run.out_dir) / FOLDER
        with raise_on_all_ranks(mesh):  # more files than ranks are possible
            for path in sorted(folder.glob(PATTERN))[mesh.rank :: mesh.world]:
                keep_frames(path, lambda content: _step(content) <= steps_done)
        if ctx.cfg.rollout.save:
            with raise_on_all_ranks(mesh):
                self._file = FrameFile(folder / f"rank-{mesh.rank:04d}.jsonl.zst")

    def write(self, rollout_batch: RolloutBatch, step: int, version: int) -> None:
        """Append the groups of `step`, counted from 1, which begins with the weights `version`.

        Call it before the update: if the disk is full, the run ends before the step and repeats
        it when it resumes.
        """
        if self._file is None:
            return
        ctx = self._ctx
        with ctx.clock("store"), raise_on_all_ranks(ctx.mesh):
            if records := _records(ctx, rollout_batch, step, version):
                self._file.append([encode(record) for record in records])


def _records(
    ctx: RunContext, rollout_batch: RolloutBatch, step: int, version: int
) -> list[GroupRecord]:
    """Return the records of this rank's shard. The ranks of a replica hold the same groups."""
    experiences = {id(e.scored): e for e in rollout_batch.experiences}
    kept = {id(experience) for experience in rollout_batch.kept}
    spec = sampling_spec(ctx.cfg)
    records = []
    for group in shard(rollout_batch.groups, ctx.mesh.model):
        experience = experiences.get(id(group))
        status: GroupStatus = (
            "kept" if id(experience) in kept else "zero_variance" if experience else "invalid"
        )
        advantages = experience.advantages if experience else None
        records.append(record_of(group, advantages, status, spec, step, version))
    return records


class _Head(msgspec.Struct):
    step: int


def _step(content: bytes) -> int:
    """Return the step of a compressed frame. All its groups are of one step."""
    return msgspec.json.decode(content.partition(b"\n")[0], type=_Head).step
