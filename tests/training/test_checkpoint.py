"""Checkpoints: what is saved comes back in any layout, and the newest whole one is found."""

import pytest
import torch

from megatron_vrl.config import Model, Optimizer, Parallel
from megatron_vrl.errors import CheckpointError
from megatron_vrl.model.architecture import read_architecture
from megatron_vrl.model.weights import published_tensors
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.training.checkpoint import (
    latest,
    load_checkpoint,
    load_weights,
    published_files,
    read_state,
    save_checkpoint,
    save_latest,
)
from megatron_vrl.training.policy import Policy
from tests.conftest import run_python
from tests.tiny import published_model, save
from tests.training.checkpoint_worker import RESHARDED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(published_model(), tmp_path_factory.mktemp("checkpoint") / "hf")


@pytest.fixture(scope="module")
def policy(checkpoint):
    mesh = init_mesh(Parallel(), seed=1)
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_weights(checkpoint, policy)
    yield policy
    close_mesh()


@pytest.fixture(scope="module")
def third_steps(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("resharded")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_python(*launch, "-m", "tests.training.checkpoint_worker", checkpoint, directory)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in (directory / "run").iterdir() if path.is_dir()] == ["step-2"]
    return {name: torch.load(directory / f"{name}.pt") for name in ("unbroken", *RESHARDED)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", RESHARDED)
def test_training_goes_on_in_another_layout_as_if_unbroken(third_steps, layout):
    """Weights, both moments and their step count: the third AdamW step depends on each."""
    whole, resumed = third_steps["unbroken"], third_steps[layout]
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    for name, weight in resumed["weights"].items():
        error = (weight - whole["weights"][name]).norm() / whole["weights"][name].norm()
        assert error <= (0 if layout == "dp2" else 1e-5), f"{name}: {error:.1e}"


def test_weights_come_back_bit_equal_and_before_any_update(policy, checkpoint, tmp_path):
    policy.start_phase(Optimizer(lr=1e-3), num_steps=1)
    save_checkpoint(tmp_path / "saved", policy, {"step": 0}, checkpoint)
    before = {name: tensor.clone() for name, tensor in published_tensors(policy.chunks)}
    with torch.no_grad():
        for param in policy.chunks[0].parameters():
            param.zero_()
    load_checkpoint(tmp_path / "saved", policy)
    for name, tensor in published_tensors(policy.chunks):
        assert torch.equal(tensor, before[name]), name
    assert (published_files(tmp_path / "saved") / "config.json").exists()


def test_latest_is_the_marked_one_and_must_be_whole(tmp_path):
    assert latest(tmp_path) is None
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "latest").write_text("a")
    assert latest(tmp_path) == tmp_path / "a"
    (tmp_path / "c").mkdir()  # a save that was killed
    (tmp_path / "latest").write_text("c")
    assert latest(tmp_path) == tmp_path / "b"
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "b"


def test_old_and_incomplete_ones_go_and_the_pinned_one_stays(policy, checkpoint, tmp_path):
    (tmp_path / "killed.partial" / "weights").mkdir(parents=True)
    for name in ("1", "2", "3"):
        save_latest(tmp_path, name, policy, {}, checkpoint, keep=1, pinned="1")
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "latest"}
    assert latest(tmp_path) == tmp_path / "3"


def test_unreadable_state_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read .* remove it"):
        read_state(tmp_path)


def test_another_architecture_is_refused(policy, checkpoint, tmp_path):
    other = save(published_model(kv_heads=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"config\.json is of another model"):
        load_weights(other, policy)
    load_weights(checkpoint, policy)
