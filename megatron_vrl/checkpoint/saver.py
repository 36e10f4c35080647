"""The checkpoints of a run: written in the background, the newest kept, a damaged one passed over.

Weights and optimizer are copied to the memory of a forked writer process, which writes and hashes
while training goes on; at most one is in flight. A later step, the next save or the end of the run
finds that all ranks' writers are done and publishes: checkpoint, then ROOT/latest, which is
replaced atomically, and only then are older ones removed. So the only good copy is never at risk.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_vrl.checkpoint.checkpoint import (
    begin_save,
    check_checkpoint,
    publish,
    read_state,
    write_failure_named,
)
from megatron_vrl.checkpoint.layout import STATE
from megatron_vrl.errors import CheckpointError
from megatron_vrl.parallel.mesh import Mesh, raise_on_all_ranks
from megatron_vrl.policy.policy import Policy
from megatron_vrl.storage.files import full_disk_named, write_file

DAMAGED = ".damaged"


class Saver:
    """Every rank calls every method. Errors of a write are raised by a later call, on all ranks."""

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
        """`files`: name -> text of what lies beside the files of `template`."""
        self.root = Path(root)
        self._policy, self._template, self._files = policy, template, files
        self._keep, self._asynchronous = keep, asynchronous
        self._calls = AsyncCallsQueue(persistent=False)  # a persistent one needs a GPU
        self._in_flight: tuple[str, str] | None = None  # name, pinned

    def save(self, name: str, state: dict[str, Any], pinned: str = "") -> None:
        """Begin ROOT/name from the weights as they are, after what is in flight has ended.

        When it is published, `pinned` and the `keep` newest stay alone.
        """
        self.finish()
        request = begin_save(self.root / name, self._policy, state, self._template, self._files)
        self._in_flight = (name, pinned)
        self._calls.schedule_async_request(request)
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Publish what is in flight if every rank's writer is done."""
        self._finalise(blocking=False)

    def finish(self) -> None:
        """Wait for what is in flight, and publish it."""
        self._finalise(blocking=True)

    def abandon(self) -> None:
        """End the writer of what is in flight; for a run that ends of an error. Any rank may call
        it alone. The checkpoint stays NAME.partial, which the next save removes."""
        for call in self._calls.async_calls:
            writer = call.async_caller.process
            if writer is not None:
                writer.kill()
                writer.join()

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
        publish(self.root / name, mesh)
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
    """The newest complete checkpoint under ROOT, or None."""
    return next(iter(_candidates(Path(root))), None)


def newest_sound(root: str | Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, and a sentence for each
    newer one that is not. Those are set aside as NAME.damaged. Every rank calls it.

    Raises CheckpointError if there are checkpoints and all are damaged.
    """
    with raise_on_all_ranks(mesh):
        candidates = _candidates(Path(root))
    sentences: list[str] = []
    found = None
    for candidate in candidates:
        try:
            check_checkpoint(candidate, mesh)
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
    """Complete checkpoints: the one that `latest` names, then the newest first."""
    newest_first = _complete(root)[::-1]
    marker = root / "latest"
    marked = root / marker.read_text().strip() if marker.is_file() else None
    return sorted(newest_first, key=lambda directory: directory != marked)


def _complete(root: Path) -> list[Path]:
    """Complete checkpoints under ROOT, oldest first."""
    found = [s.parent for s in root.glob(f"*/{STATE}") if s.parent.suffix not in _UNFIT]
    return sorted(found, key=lambda directory: (directory / STATE).stat().st_mtime)


_UNFIT = {DAMAGED, ".partial"}
