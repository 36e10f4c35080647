"""Checkpoints that cannot be used: damaged, of another model, incomplete, with pickles."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vrl.checkpoint.checkpoint import (
    load_checkpoint,
    load_weights,
    read_state,
)
from megatron_vrl.checkpoint.checksums import write_sums
from megatron_vrl.checkpoint.convert import convert_to_hf, convert_to_megatron
from megatron_vrl.checkpoint.layout import hf_dir_of
from megatron_vrl.checkpoint.saver import Saver, latest, newest_sound
from megatron_vrl.config import Optimizer
from megatron_vrl.errors import CheckpointError
from megatron_vrl.policy.policy import Policy
from tests.tiny_models import hf_model, save

DAMAGE = {
    "half a file": lambda d: os.truncate(d / "weights" / "__0_0.distcp", 1000),
    "one bit": lambda d: flip_bit(d / "weights" / "__0_0.distcp"),
    "a missing file": lambda d: (d / "weights" / "__0_0.distcp").unlink(),
    "no CHECKSUMS": lambda d: (d / "CHECKSUMS").unlink(),
    "no JSON": lambda d: (d / "state.json").write_text("{"),
}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    policy: Policy, converted: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    for name in ("1", "2"):
        shutil.copytree(converted, tmp_path / name)
    (tmp_path / "latest").write_text("2")
    damage(tmp_path / "2")
    found, sentences = newest_sound(tmp_path, policy.mesh)
    assert found == tmp_path / "1" == latest(tmp_path)
    (sentence,) = sentences
    assert str(tmp_path / "2") in sentence
    assert sentence.endswith("The checkpoint before it is used.") and "\n" not in sentence
    assert newest_sound(tmp_path, policy.mesh) == (tmp_path / "1", [])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    policy: Policy, converted: Path, tmp_path: Path
) -> None:
    shutil.copytree(converted, tmp_path / "1")
    flip_bit(tmp_path / "1" / "weights" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be used"):
        newest_sound(tmp_path, policy.mesh)
    assert (tmp_path / "1").exists()
    assert newest_sound(tmp_path / "empty", policy.mesh) == (None, [])


def test_the_old_name_of_a_folder_is_refused_and_its_sentence_is_the_cure(
    policy: Policy, converted: Path, tmp_path: Path
) -> None:
    old = tmp_path / "1"
    shutil.copytree(converted, old)
    (old / "huggingface").rename(old / "published")
    sums = (old / "CHECKSUMS").read_text()
    (old / "CHECKSUMS").write_text(sums.replace("  huggingface/", "  published/"))
    for use in (lambda: hf_dir_of(old), lambda: newest_sound(tmp_path, policy.mesh)):
        with pytest.raises(CheckpointError, match="called huggingface now: rename it") as error:
            use()
    assert old.is_dir()  # and not set aside as a damaged one
    command = str(error.value).partition("(")[2].removesuffix(").")
    subprocess.run(command, shell=True, check=True)
    assert newest_sound(tmp_path, policy.mesh) == (old, [])
    assert (hf_dir_of(old) / "config.json").is_file()


def test_a_saver_hashes_a_checkpoint_once(policy: Policy, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "1")
    saver = Saver(tmp_path, policy, converted, keep=1)
    assert saver.newest_sound() == (tmp_path / "1", [])
    flip_bit(tmp_path / "1" / "huggingface" / "config.json")  # is not read again by this saver
    saver.load_weights(tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        Saver(tmp_path, policy, converted, keep=1).load_weights(tmp_path / "1")


def test_unreadable_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read .* remove it"):
        read_state(tmp_path)


def test_another_architecture_is_refused(policy: Policy, checkpoint: Path, tmp_path: Path) -> None:
    other = save(hf_model(vocab=95, kv_heads=1), tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: .*_proj.*config\.json is of another model"
    ):
        load_weights(other, policy)
    load_weights(checkpoint, policy)
    convert_to_megatron(other, tmp_path / "megatron")
    with pytest.raises(
        CheckpointError, match=r"weights: language\.decoder.*linear_qkv.* has the shape"
    ):
        load_weights(tmp_path / "megatron", policy)


def test_weights_alone_do_not_pass_for_a_whole_checkpoint(policy: Policy, converted: Path) -> None:
    policy.start_phase(Optimizer(lr=1e-3), num_steps=1)
    with pytest.raises(CheckpointError, match=r"lacks the tensor optimizer\..*without the optim"):
        load_checkpoint(converted, policy)


# ---- pickles


def poisoned(converted: Path, directory: Path, payload: Callable[[Path], object]) -> Path:
    """A copy whose CHECKSUMS are right: whoever gives away a bad checkpoint can hash it too."""
    copy = shutil.copytree(converted, directory)
    payload(copy / "weights")
    (copy / "CHECKSUMS").unlink()
    write_sums(copy, {})
    return copy


@pytest.mark.parametrize("file", [".metadata", "common.pt", "byte object"])
def test_no_pickle_of_a_checkpoint_runs(
    policy: Policy, converted: Path, tmp_path: Path, file: str
) -> None:
    import io
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
            return (open, (str(tmp_path / "ran"), "w"))

    def payload(weights: Path) -> None:
        if file == ".metadata":
            (weights / file).write_bytes(pickle.dumps(Payload()))
        elif file == "common.pt":
            torch.save({"x": Payload()}, weights / file)
        else:
            add_byte_object(weights, Payload())

    def add_byte_object(weights: Path, thing: object) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        content = io.BytesIO()
        torch.save(thing, content)
        (weights / "__9_0.distcp").write_bytes(content.getvalue())
        metadata = pickle.loads((weights / ".metadata").read_bytes())
        metadata.state_dict_metadata["x"] = BytesStorageMetadata()
        place = _StorageInfo("__9_0.distcp", 0, len(content.getvalue()))
        metadata.storage_data[MetadataIndex("x")] = place
        (weights / ".metadata").write_bytes(pickle.dumps(metadata))

    bad = poisoned(converted, tmp_path / "bad", payload)
    stored = {"byte object": "__9_0.distcp"}.get(file, file)
    for use in (
        lambda: load_weights(bad, policy),
        lambda: convert_to_hf(bad, tmp_path / "x"),
    ):
        with pytest.raises(CheckpointError, match=rf"{stored}.* names (_io|io)\.open, which no"):
            use()
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "x").exists()


def test_a_bare_pickle_in_place_of_a_zip_is_refused(
    policy: Policy, converted: Path, tmp_path: Path
) -> None:
    import pickle

    bad = poisoned(
        converted,
        tmp_path / "bad",
        lambda weights: (weights / "common.pt").write_bytes(pickle.dumps({})),
    )
    with pytest.raises(CheckpointError, match=r"common\.pt is damaged"):
        load_weights(bad, policy)
