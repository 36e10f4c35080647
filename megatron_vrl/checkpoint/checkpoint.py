"""Megatron distributed checkpoints: weights, optimizer state and the state of the run.

A checkpoint is a directory with

    weights/       torch_dist files, which are resharded on load
    huggingface/   config, tokenizer and processor files, with which an engine can start
    state.json     state of the run
    adapters.json  with `model.lora`: `weights/` holds adapters only, of the base that it names
    CHECKSUMS      hash of every file

States of a checkpoint:

    WRITTEN    as NAME.partial: every rank's writer has ended and has hashed its files
    COMMITTED  CHECKSUMS is complete and the directory has been renamed to NAME
    VERIFIED   by the process that loads it: files equal CHECKSUMS, pickles pass the allow-list

`load_weights` and `load_checkpoint` use no file of a Megatron checkpoint before it is verified.
`saver.py` decides when a run writes checkpoints and which ones it keeps.

Every rank writes the optimizer state that it holds, and its share of what all data ranks hold
alike. Nothing is gathered: a save needs host memory of the size of the files that the rank writes,
and none on a GPU (`sharded_state.py`).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vrl.checkpoint.adapters_note import read_note
from megatron_vrl.checkpoint.checksums import ChecksumVerifier, file_sum, write_sums
from megatron_vrl.checkpoint.frozen_base import base_digest, check_fits_policy, write_note
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.checkpoint.hf_reader import copy_side_files
from megatron_vrl.checkpoint.layout import HF, STATE, WEIGHTS, is_megatron
from megatron_vrl.checkpoint.peft_files import begin_adapters
from megatron_vrl.checkpoint.safe_pickle import check_pickles
from megatron_vrl.checkpoint.sharded_state import model_state, state_to_load, state_to_save
from megatron_vrl.errors import CheckpointError
from megatron_vrl.parallel import mcore_compat
from megatron_vrl.parallel.mesh import Mesh, raise_on_all_ranks
from megatron_vrl.policy.optimizer_state import set_step_count
from megatron_vrl.policy.policy import Policy
from megatron_vrl.storage.files import full_disk_named

_SUMS = "sums-{}.json"  # hashes of one rank's files, merged into CHECKSUMS by `commit`


def save_checkpoint(
    directory: str | Path, policy: Policy, state: dict[str, Any], template: str | Path
) -> None:
    """Write and commit one checkpoint. Every rank calls it. `state` must be JSON.

    Raises UserError on every rank if the disk is full.
    """
    directory = Path(directory)
    request = begin_save(directory, policy, state, template)
    with write_failure_named(directory, policy.mesh):
        request.execute_sync()
    commit(directory, policy.mesh)


def begin_save(
    directory: Path,
    policy: Policy,
    state: dict[str, Any],
    template: str | Path,
    files: Mapping[str, str] | None = None,
) -> AsyncRequest:
    """Prepare DIRECTORY.partial and return the request by which this rank writes its tensors.

    `template`: folder with the config, tokenizer and processor files. `files`: name -> text of
    more files to write beside them.
    """
    partial = _partial(directory)
    with raise_on_all_ranks(policy.mesh), full_disk_named(directory):
        if policy.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / WEIGHTS).mkdir(parents=True)
            copy_side_files(template, partial / HF)
            for name, text in (files or {}).items():
                (partial / HF / name).write_text(text)
            if policy.lora.rank:
                write_note(partial, policy)
            (partial / STATE).write_text(json.dumps(state, indent=1))
    with write_failure_named(directory, policy.mesh):
        request = dist_checkpointing.save(
            state_to_save(policy),
            str(partial / WEIGHTS),
            validate_access_integrity=False,  # torch compares the blocks of all ranks
            async_sharded_save=True,
            **mcore_compat.SAVE,
        )
    assert request is not None
    if request.async_fn is None:  # this rank has nothing to write
        return request
    _, buckets, _ = request.async_fn_args
    return request._replace(
        async_fn=_then_hash(request.async_fn, partial, policy.mesh.rank),
        # A copy to pinned memory would take up to twice the bytes: torch rounds each tensor up to
        # a power of two, and keeps the memory afterwards.
        preload_fn=lambda: FileSystemWriterAsync.preload_tensors(buckets, non_blocking=False),
    )


def _then_hash(write: Callable[..., None], partial: Path, rank: int) -> Callable[..., None]:
    """Return a writer that runs Megatron's `write` and then hashes the files it wrote.

    It runs in the writer process.
    """

    def run(rank_: int, buckets: list[Any], *rest: Any) -> None:
        write(rank_, buckets, *rest)
        with suppress(OSError):  # the writer reports its own failure
            sums = {f"{WEIGHTS}/{name}": file_sum(Path(path)) for path, name, _ in buckets}
            (partial / _SUMS.format(rank)).write_text(json.dumps(sums))

    return run


def commit(directory: Path, mesh: Mesh) -> None:
    """Complete CHECKSUMS of a written checkpoint and rename it to `directory`.

    Every rank calls it, after the writers of all ranks have ended.
    """
    partial, old = _partial(directory), directory.with_name(directory.name + ".old")
    with raise_on_all_ranks(mesh), full_disk_named(directory):
        if mesh.rank == 0:
            known: dict[str, str] = {}
            for file in partial.glob(_SUMS.format("*")):
                known |= json.loads(file.read_text())
                file.unlink()
            write_sums(partial, known)
            if directory.exists():
                directory.rename(old)
            partial.rename(directory)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def write_failure_named(directory: Path, mesh: Mesh) -> Iterator[None]:
    """Raise a CheckpointError in place of Megatron's error of a failed writer.

    Every rank raises it.
    """
    try:
        yield
    except CheckpointException:
        free_mib = shutil.disk_usage(directory.parent).free >> 20
        if mesh.rank == 0:
            shutil.rmtree(_partial(directory), ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint {directory} cannot be written; its disk has {free_mib} MiB left. "
            "Make room and start the same command again."
        ) from None


def verify(checkpoint: Path, mesh: Mesh, verifier: ChecksumVerifier) -> Metadata:
    """Verify a committed checkpoint and return the metadata of its tensors. Every rank calls it.

    Raises CheckpointError on every rank if a file is damaged or a pickle is not allowed.
    """
    verifier.check(checkpoint, mesh)
    with raise_on_all_ranks(mesh):
        return check_pickles(checkpoint / WEIGHTS)


def load_weights(
    checkpoint: str | Path, policy: Policy, verifier: ChecksumVerifier | None = None
) -> None:
    """Load the weights of a Hugging Face or a Megatron checkpoint. Every rank calls it.

    With `model.lora` a checkpoint of adapters gives the adapters. Whole weights are the frozen
    base, and the adapters begin anew.
    """
    checkpoint = Path(checkpoint)
    with raise_on_all_ranks(policy.mesh):
        holds_adapters = read_note(checkpoint) is not None
        if holds_adapters:
            check_fits_policy(checkpoint, policy)
    if is_megatron(checkpoint):
        base = not holds_adapters and policy.lora.rank > 0
        _load(checkpoint, model_state(policy, base=base), policy, verifier)
    elif checkpoint.is_dir():
        load_hf_weights(policy.chunks, checkpoint)
    else:
        raise CheckpointError(f"There is no checkpoint {checkpoint}: set model.checkpoint.")
    if policy.lora.rank and not holds_adapters:
        policy.base_digest = base_digest(policy.chunks)
        begin_adapters(policy)
    if policy.optimizer is not None:
        policy.optimizer.reload_model_params()


def load_checkpoint(
    checkpoint: str | Path, policy: Policy, verifier: ChecksumVerifier | None = None
) -> None:
    """Load weights and optimizer state, after `policy.start_phase`. Every rank calls it.

    The optimizer's settings, such as `betas`, stay those of `start_phase`.
    """
    assert policy.optimizer is not None, "start_phase first"
    with raise_on_all_ranks(policy.mesh):
        check_fits_policy(Path(checkpoint), policy)
    loaded = _load(Path(checkpoint), state_to_load(policy), policy, verifier)
    set_step_count(policy.optimizer, _stored_step(loaded["optimizer"]))


def _stored_step(stored: dict[str, Any]) -> int:
    """Return the number of updates before a checkpoint, from its part "optimizer"."""
    if "step" in stored:
        return int(stored["step"])
    groups = stored["optimizer"]["param_groups"]  # written by Megatron
    return max(int(group["step"]) for group in groups)


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """Return the content of state.json. Raises CheckpointError if it cannot be read."""
    try:
        state: dict[str, Any] = json.loads((Path(checkpoint) / STATE).read_text())
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}/{STATE} cannot be read ({error}): remove it."
        ) from None


def _load(
    checkpoint: Path,
    sharded: dict[str, Any],
    policy: Policy,
    verifier: ChecksumVerifier | None,
) -> dict[str, Any]:
    """Read the tensors of `sharded` into their place and return what was loaded."""
    metadata = verify(checkpoint, policy.mesh, verifier or ChecksumVerifier())
    with raise_on_all_ranks(policy.mesh):
        _check_fit(checkpoint, sharded, metadata)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(checkpoint / WEIGHTS))
    except (
        CheckpointingException,
        CheckpointException,
        OSError,
        RuntimeError,
        KeyError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({reason}): use another checkpoint."
        ) from error
    for number, chunk in enumerate(policy.chunks):
        left = chunk.load_state_dict(loaded[f"chunk{number}"], strict=False)
        lost = [*left.missing_keys, *left.unexpected_keys]
        if policy.lora.rank:  # adapters and their base are in different checkpoints
            lost = left.unexpected_keys
        assert all("_extra_state" in name for name in lost), lost  # `_extra_state` is not saved
    return loaded


def _check_fit(checkpoint: Path, sharded: dict[str, Any], metadata: Metadata) -> None:
    """Raises CheckpointError naming the first tensor that is missing or has another shape."""
    folder = checkpoint / WEIGHTS
    for wanted in _tensors(sharded):
        stored = metadata.state_dict_metadata.get(wanted.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(
                f"{folder} lacks the tensor {wanted.key}: it is of another model or model.dtype, "
                "or without the optimizer."
            )
        shapes = [list(stored.size), list(wanted.global_shape)]
        if wanted.allow_shape_mismatch:  # a vocabulary, padded for another layout
            shapes = [shape[1:] for shape in shapes]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{folder}: {wanted.key} has the shape {list(stored.size)}, and the model asks for "
                f"{list(wanted.global_shape)}: it is of another model."
            )


def _tensors(sharded: Any) -> Iterator[ShardedTensor]:
    """Yield the tensors of a sharded state dict, with those that its factories build."""
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensorFactory):
            yield from _tensors({"built": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")
