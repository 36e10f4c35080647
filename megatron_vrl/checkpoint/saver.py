"""Checkpoints of a run under one root: asynchronous saves, retention, and loading.

Life of a save:

    BEGUN      `save` has copied weights and optimizer state to forked writer processes, which
               write and hash files while training goes on
    WRITTEN    the writers of all ranks have ended
    COMMITTED  `poll`, `finish` or the next `save` has renamed ROOT/NAME.partial to ROOT/NAME
    LATEST     ROOT/latest names it (replaced atomically); only then older checkpoints are removed

At most one save is in flight. Example with keep=2: `save` at step 20 begins grpo-0-000020 while
000010 and 000015 are on the disk. `poll` after step 22 commits it, writes ROOT/latest and removes
000010. A process killed at step 21 leaves grpo-0-000020.partial and resumes from 000015.

A checkpoint that fails verification is set aside as NAME.damaged, and the one before it is used.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_vrl.checkpoint.checkpoint import (
    begin_save,
    commit,
    load_checkpoint,
    load_weights,
    read_state,
    verify,
    write_failure_named,
)
from megatron_vrl.checkpoint.checksums import ChecksumVerifier
from megatron_vrl.checkpoint.layout import STATE, refuse_old_name
from megatron_vrl.errors import CheckpointError
from megatron_vrl.parallel.mesh import Mesh, raise_on_all_ranks
from megatron_vrl.policy.policy import Policy
from megatron_vrl.storage.files import full_disk_named, write_file

DAMAGED = ".damaged"


class Saver:
    """Saver and loader of one run's checkpoints. Every rank calls every method.

    An error of a writer is raised by a later call, on all ranks.
    """

    def __init__(
        self,
        root: str | Path,
        policy: Policy,
        template: str | Path,
        *,
        keep: int,
        asynchronous: bool = True,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """`template`: folder with the config, tokenizer and processor files of the model.

        `files`: name -> text of more files to write beside them. `keep`: number of checkpoints.
        """
        self.root = Path(root)
        self._verifier = ChecksumVerifier()
        self._policy, self._template, self._files = policy, template, files
        self._keep, self._asynchronous = keep, asynchronous
        self._calls = AsyncCallsQueue(persistent=False)  # a persistent one needs a GPU
        self._in_flight: tuple[str, str] | None = None  # name, pinned

    def save(self, name: str, state: dict[str, Any], pinned: str = "") -> None:
        """Begin to write ROOT/name from the current weights, after the save in flight has ended.

        When it is committed, all but the `keep` newest and the checkpoint `pinned` are removed.
        """
        self.finish()
        request = begin_save(self.root / name, self._policy, state, self._template, self._files)
        self._in_flight = (name, pinned)
        self._calls.schedule_async_request(request)
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Commit the save in flight if the writers of all ranks have ended."""
        self._finalise(blocking=False)

    def finish(self) -> None:
        """Wait for the save in flight and commit it."""
        self._finalise(blocking=True)

    def abandon(self) -> None:
        """Kill this rank's writer of the save in flight, when a run ends with an error.

        A rank may call it alone. The checkpoint stays NAME.partial, which the next save removes.
        """
        for call in self._calls.async_calls:
            writer = call.async_caller.process
            if writer is not None:
                writer.kill()
                writer.join()

    def newest_sound(self) -> tuple[Path | None, list[str]]:
        """Call `newest_sound` for the checkpoints of this run."""
        return newest_sound(self.root, self._policy.mesh, self._verifier)

    def load_weights(self, checkpoint: str | Path) -> None:
        """Load the weights of a checkpoint, which need not be of this run."""
        load_weights(checkpoint, self._policy, self._verifier)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load the weights and optimizer state of a checkpoint, after `policy.start_phase`."""
        load_checkpoint(checkpoint, self._policy, self._verifier)

    def _finalise(self, blocking: bool) -> None:
        if self._in_flight is None:
            return
        (name, pinned), mesh = self._in_flight, self._policy.mesh
        try:
            with write_failure_named(self.root / name, mesh):
                if not self._calls.maybe_finalize_async_calls(blocking=blocking):
                    return
        except CheckpointError:
            self._in_flight = None
            raise
        self._in_flight = None
        commit(self.root / name, mesh)
        with raise_on_all_ranks(mesh), full_disk_named(self.root):
            if mesh.rank == 0:
                write_file(self.root / "latest", name)
                self._remove_old({pinned})

    def _remove_old(self, pinned: set[str]) -> None:
        kept = pinned | {directory.name for directory in _complete(self.root)[-self._keep :]}
        for old in self.root.iterdir():
            if old.is_dir() and old.name not in kept:
                shutil.rmtree(old)


def latest(root: str | Path) -> Path | None:
    """Return the newest committed checkpoint under `root`, or None."""
    return next(iter(_candidates(Path(root))), None)


def newest_sound(
    root: str | Path, mesh: Mesh, verifier: ChecksumVerifier | None = None
) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that passes verification, or None without checkpoints.

    Newer ones are set aside as NAME.damaged; the list has a sentence for each. Every rank calls it.
    Raises CheckpointError if there are checkpoints and all are damaged, or one is of an old layout.
    """
    verifier = verifier or ChecksumVerifier()
    with raise_on_all_ranks(mesh):
        candidates = _candidates(Path(root))
        for candidate in candidates:
            refuse_old_name(candidate)
    sentences: list[str] = []
    found = None
    for candidate in candidates:
        try:
            verify(candidate, mesh, verifier)
            with raise_on_all_ranks(mesh):
                read_state(candidate)
            found = candidate
            break
        except CheckpointError as error:
            sentences.append(f"{error} The checkpoint before it is used.")
    if candidates and found is None:
        raise CheckpointError(
            f"{root} holds no checkpoint that can be used ({sentences[0].split(': ')[0]}): remove "
            "it to start over."
        )
    with raise_on_all_ranks(mesh):
        if mesh.rank == 0:
            for damaged in candidates[: len(sentences)]:
                aside = damaged.with_name(damaged.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(damaged, aside)
    return found, sentences


def _candidates(root: Path) -> list[Path]:
    """Return the committed checkpoints: first the one that `latest` names, then newest first."""
    newest_first = _complete(root)[::-1]
    marker = root / "latest"
    marked = root / marker.read_text().strip() if marker.is_file() else None
    return sorted(newest_first, key=lambda directory: directory != marked)


def _complete(root: Path) -> list[Path]:
    """Return the committed checkpoints under `root`, oldest first."""
    found = [s.parent for s in root.glob(f"*/{STATE}") if s.parent.suffix not in _UNFIT]
    return sorted(found, key=lambda directory: (directory / STATE).stat().st_mtime)


_UNFIT = {DAMAGED, ".partial"}
