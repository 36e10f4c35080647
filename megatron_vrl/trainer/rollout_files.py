"""OUT/rollouts: every group of answers with its rewards, as each rank writes them step by step.

A run that goes on from a checkpoint first takes back what it had written of later steps, so that
no group is there twice and none is lost, whatever was killed and however many ranks go on.
"""

from pathlib import Path

import msgspec

from megatron_vrl.context import Parts
from megatron_vrl.parallel.mesh import agreed
from megatron_vrl.rollout.records import PATTERN, Fate, GroupRecord, encode, record_of
from megatron_vrl.storage.compressed import FrameFile, keep_frames
from megatron_vrl.trainer.experience import Collected
from megatron_vrl.trainer.rollout_queue import sampling_spec

FOLDER = "rollouts"


class RolloutFiles:
    """This rank's. Every rank calls its methods, in the same order."""

    def __init__(self, parts: Parts, steps_done: int) -> None:
        self._parts = parts
        self._file: FrameFile | None = None
        mesh, folder = parts.mesh, Path(parts.cfg.run.out_dir) / FOLDER
        with agreed(mesh):  # a rank's file may be of a rank that is no more
            for path in sorted(folder.glob(PATTERN))[mesh.rank :: mesh.world]:
                keep_frames(path, lambda content: _step(content) <= steps_done)
        if parts.cfg.rollout.save:
            with agreed(mesh):
                self._file = FrameFile(folder / f"rank-{mesh.rank:04d}.jsonl.zst")

    def write(self, collected: Collected, step: int, version: int) -> None:
        """`step`, from 1, begins with the weights `version`. Before the update: a full disk then
        ends the run where its checkpoint says that the step is still to be made."""
        if self._file is None:
            return
        parts = self._parts
        with parts.clock("store"), agreed(parts.mesh):
            if records := _records(parts, collected, step, version):
                self._file.append([encode(record) for record in records])


def _records(parts: Parts, collected: Collected, step: int, version: int) -> list[GroupRecord]:
    """This rank's share: the ranks of a replica hold the same groups."""
    experiences = {id(e.scored): e for e in collected.experiences}
    kept = {id(experience) for experience in collected.kept}
    spec = sampling_spec(parts.cfg)
    records = []
    for group in collected.groups[parts.mesh.model.rank :: parts.mesh.model.size]:
        experience = experiences.get(id(group))
        fate: Fate = "kept" if id(experience) in kept else "uniform" if experience else "invalid"
        advantages = experience.advantages if experience else None
        records.append(record_of(group, advantages, fate, spec, step, version))
    return records


class _Head(msgspec.Struct):
    step: int


def _step(content: bytes) -> int:
    """Of a frame, which holds groups of one step."""
    return msgspec.json.decode(content.partition(b"\n")[0], type=_Head).step
