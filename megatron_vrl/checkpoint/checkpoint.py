"""Megatron distributed checkpoints of a run: weights, optimizer, and where the run stood.

A checkpoint is a directory: `weights/` (torch_dist, resharded on load), `published/` (config,
tokenizer and processor files, so that an engine can start from it), `state.json` and CHECKSUMS. It
is written beside its place, as NAME.partial, and takes its name when it is whole. Before anything
of it is used its files are compared with CHECKSUMS and its pickles read under an allow-list.

Which of a run's checkpoints is written when, and which are kept: `saver.py`.
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vrl.checkpoint.checksums import check_sums, file_sum, write_sums
from megatron_vrl.checkpoint.hf_load import load_hf_weights
from megatron_vrl.checkpoint.hf_reader import copy_side_files
from megatron_vrl.checkpoint.layout import STATE, is_megatron
from megatron_vrl.checkpoint.safe_pickle import check_pickles
from megatron_vrl.errors import CheckpointError
from megatron_vrl.parallel.mesh import Mesh, raise_on_all_ranks
from megatron_vrl.policy.policy import Policy
from megatron_vrl.storage.files import full_disk_named

# Megatron 0.16's default sharding of optimizer state no longer works; this one reshards freely.
_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}
_LAYERS = {"non_homogeneous_layers": True}  # a name for each layer, instead of one stack of them
_SUMS = "sums-{}.json"  # what one rank's writer leaves for `publish`


def save_checkpoint(
    directory: str | Path, policy: Policy, state: dict[str, Any], template: str | Path
) -> None:
    """Write one checkpoint and wait for it; every rank calls it. `state` must be JSON.

    Raises UserError on every rank if the disk is full.
    """
    directory = Path(directory)
    request = begin_save(directory, policy, state, template)
    with write_failure_named(directory, policy.mesh):
        request.execute_sync()
    publish(directory, policy.mesh)


def begin_save(
    directory: Path,
    policy: Policy,
    state: dict[str, Any],
    template: str | Path,
    files: Mapping[str, str] | None = None,
) -> AsyncRequest:
    """Prepare DIRECTORY.partial; what the request says is then to be done on every rank.

    `files`: name -> text of what lies beside the files of `template`.
    """
    partial = _partial(directory)
    with raise_on_all_ranks(policy.mesh), full_disk_named(directory):
        if policy.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "weights").mkdir(parents=True)
            copy_side_files(template, partial / "published")
            for name, text in (files or {}).items():
                (partial / "published" / name).write_text(text)
            (partial / STATE).write_text(json.dumps(state, indent=1))
    with write_failure_named(directory, policy.mesh):
        request = dist_checkpointing.save(
            _sharded(policy), str(partial / "weights"), async_sharded_save=True
        )
    assert request is not None
    if request.async_fn is None:  # this rank has nothing to write
        return request
    hashing = _then_hash(request.async_fn, partial, policy.mesh.rank)
    return request._replace(async_fn=hashing)


def _then_hash(write: Callable[..., None], partial: Path, rank: int) -> Callable[..., None]:
    """Megatron's writer, then the sums of the files it wrote. Runs in the writer's process."""

    def run(rank_: int, buckets: list[Any], *rest: Any) -> None:
        write(rank_, buckets, *rest)
        with suppress(OSError):  # the writer reports its own failure
            sums = {f"weights/{name}": file_sum(Path(path)) for path, name, _ in buckets}
            (partial / _SUMS.format(rank)).write_text(json.dumps(sums))

    return run


def publish(directory: Path, mesh: Mesh) -> None:
    """Give a checkpoint that all ranks have written its name. Every rank calls it."""
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
    """Turn Megatron's "a writer failed", which every rank raises, into one sentence."""
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


def check_checkpoint(checkpoint: Path, mesh: Mesh) -> Metadata:
    """Raises CheckpointError on every rank unless it is whole and harmless. Every rank calls it."""
    check_sums(checkpoint, mesh)
    with raise_on_all_ranks(mesh):
        return check_pickles(checkpoint / "weights")


def load_weights(checkpoint: str | Path, policy: Policy) -> None:
    """Weights alone, from a Hugging Face or a Megatron checkpoint. Every rank calls it."""
    checkpoint = Path(checkpoint)
    if is_megatron(checkpoint):
        _load(checkpoint, _sharded_model(policy), policy)
    elif checkpoint.is_dir():
        load_hf_weights(policy.chunks, checkpoint)
    else:
        raise CheckpointError(f"There is no checkpoint {checkpoint}: set model.checkpoint.")
    if policy.optimizer is not None:
        policy.optimizer.reload_model_params()


def load_checkpoint(checkpoint: str | Path, policy: Policy) -> None:
    """Weights and optimizer; `policy.start_phase` must have been called. Every rank calls it."""
    _load(Path(checkpoint), _sharded(policy, is_loading=True), policy)


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((Path(checkpoint) / STATE).read_text())
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}/{STATE} cannot be read ({error}): remove it."
        ) from None


def _sharded(policy: Policy, is_loading: bool = False) -> dict[str, Any]:
    state = _sharded_model(policy)
    if policy.optimizer is not None:
        state["optimizer"] = policy.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=dict(_OPTIMIZER)
        )
    return state


def _sharded_model(policy: Policy) -> dict[str, Any]:
    """Chunks under local names; on disk a tensor is named by its layer in the whole model.

    Without Megatron's `_extra_state`, which only FP8 layers fill and which would be pickles.
    """
    state: dict[str, Any] = {}
    for number, chunk in enumerate(policy.chunks):
        entries = chunk.sharded_state_dict(metadata=dict(_LAYERS))  # it adds to it
        kept = {name: entry for name, entry in entries.items() if "_extra_state" not in name}
        state[f"chunk{number}"] = kept
    return state


def _load(checkpoint: Path, sharded: dict[str, Any], policy: Policy) -> None:
    metadata = check_checkpoint(checkpoint, policy.mesh)
    with raise_on_all_ranks(policy.mesh):
        _check_fit(checkpoint, sharded, metadata)
    try:
        loaded = dist_checkpointing.load(sharded, str(checkpoint / "weights"))
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
        assert all("_extra_state" in name for name in lost), lost  # which is not saved
    if "optimizer" in sharded:
        assert policy.optimizer is not None
        policy.optimizer.load_state_dict(loaded["optimizer"])


def _check_fit(checkpoint: Path, sharded: dict[str, Any], metadata: Metadata) -> None:
    """Raises CheckpointError naming the first tensor that is not there or has another shape."""
    place = checkpoint / "weights"
    for wanted in _tensors(sharded):
        stored = metadata.state_dict_metadata.get(wanted.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(
                f"{place} lacks the tensor {wanted.key}: it is of another model, or without the "
                "optimizer."
            )
        shapes = [list(stored.size), list(wanted.global_shape)]
        if wanted.allow_shape_mismatch:  # a vocabulary, padded for another layout
            shapes = [shape[1:] for shape in shapes]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{place}: {wanted.key} has the shape {list(stored.size)}, and the model asks for "
                f"{list(wanted.global_shape)}: it is of another model."
            )


def _tensors(sharded: Any) -> Iterator[ShardedTensor]:
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensorFactory):
            yield from _tensors({"built": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")
