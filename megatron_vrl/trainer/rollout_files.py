"""OUT/rollouts: every group of answers with its rewards, as each rank writes them step by step.

A run that goes on from a checkpoint first takes back what it had written of later steps, so that
no group is there twice and none is lost, whatever was killed and however many ranks go on.
"""

from pathlib import Path

import msgspec

from megatron_vrl.context import RunContext
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.rollout.records import PATTERN, GroupRecord, GroupStatus, encode, record_of
from megatron_vrl.storage.compressed import FrameFile, keep_frames
from megatron_vrl.trainer.experience import RolloutBatch
from megatron_vrl.trainer.rollout_queue import sampling_spec

FOLDER = "rollouts"


class RolloutFiles:
    """This rank's. Every rank calls its methods, in the same order."""

    def __init__(self, ctx: RunContext, steps_done: int) -> None:
        self._ctx = ctx
        self._file: FrameFile | None = None
        mesh, folder = ctx.mesh, Path(ctx.cfg.run.out_dir) / FOLDER
        with raise_on_all_ranks(mesh):  # a rank's file may be of a rank that is no more
            for path in sorted(folder.glob(PATTERN))[mesh.rank :: mesh.world]:
                keep_frames(path, lambda content: _step(content) <= steps_done)
        if ctx.cfg.rollout.save:
            with raise_on_all_ranks(mesh):
                self._file = FrameFile(folder / f"rank-{mesh.rank:04d}.jsonl.zst")

    def write(self, rollout_batch: RolloutBatch, step: int, version: int) -> None:
        """`step`, from 1, begins with the weights `version`. Before the update: a full disk then
        ends the run where its checkpoint says that the step is still to be made."""
        if self._file is None:
            return
        ctx = self._ctx
        with ctx.clock("store"), raise_on_all_ranks(ctx.mesh):
            if records := _records(ctx, rollout_batch, step, version):
                self._file.append([encode(record) for record in records])


def _records(
    ctx: RunContext, rollout_batch: RolloutBatch, step: int, version: int
) -> list[GroupRecord]:
    """This rank's share: the ranks of a replica hold the same groups."""
    experiences = {id(e.scored): e for e in rollout_batch.experiences}
    kept = {id(experience) for experience in rollout_batch.kept}
    spec = sampling_spec(ctx.cfg)
    records = []
    for group in rollout_batch.groups[ctx.mesh.model.rank :: ctx.mesh.model.size]:
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
    """Of a frame, which holds groups of one step."""
    return msgspec.json.decode(content.partition(b"\n")[0], type=_Head).step
