"""Checkpoints: what is saved comes back in any layout, and the newest whole one is found."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_vrl.checkpoint.checkpoint import (
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from megatron_vrl.checkpoint.convert import compare, convert_to_hf
from megatron_vrl.checkpoint.hf_load import hf_tensors
from megatron_vrl.checkpoint.layout import hf_dir_of
from megatron_vrl.checkpoint.saver import Saver, latest
from megatron_vrl.checkpoint.sharded_state import model_state, state_to_save
from megatron_vrl.checkpoint.torch_dist import TorchDistReader
from megatron_vrl.config import Model, Optimizer, Parallel, Run, RunConfig
from megatron_vrl.errors import CheckpointError
from megatron_vrl.parallel import adamw
from megatron_vrl.planner.memory import checkpoint_bytes
from megatron_vrl.planner.parameters import count_stage
from megatron_vrl.policy.optimizer_state import ParameterState, parameter_states, step_count
from megatron_vrl.policy.policy import Policy
from tests.checkpoint.checkpoint_worker import OPTIMIZER, RESHARDED, SAVED, step
from tests.running import run_python


@pytest.fixture(scope="module")
def trained(checkpoint: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resharded")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.checkpoint.checkpoint_worker", checkpoint, converted, directory]
    done = run_python(*launch, *worker)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in (directory / "run").iterdir() if path.is_dir()] == ["step-2"]
    return directory


def third_step(trained: Path, name: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(trained / f"{name}.pt")
    return state


def assert_alike(resumed: dict[str, Any], whole: dict[str, Any], tolerance: float) -> None:
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    for name, weight in resumed["weights"].items():
        error = (weight - whole["weights"][name]).norm() / whole["weights"][name].norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", RESHARDED)
def test_training_goes_on_in_another_layout_as_if_unbroken(trained: Path, layout: str) -> None:
    """Weights, both moments and their step count: the third AdamW step depends on each. The
    checkpoint was written while the weights already changed."""
    resumed, whole = third_step(trained, layout), third_step(trained, "unbroken")
    assert_alike(resumed, whole, tolerance=0 if layout == "dp2" else 1e-5)


@pytest.mark.slow
def test_training_goes_on_with_half_the_data_ranks(trained: Path, policy: Policy) -> None:
    policy.start_phase(OPTIMIZER, num_steps=8)
    load_checkpoint(trained / "run" / "step-2", policy)
    assert_alike(step(policy, 2), third_step(trained, "unbroken"), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED)
def test_checkpoints_of_any_layout_convert(trained: Path, layout: str, tmp_path: Path) -> None:
    convert_to_hf(trained / "saved" / layout, tmp_path / "hf")
    assert compare(trained / "run" / "step-2", tmp_path / "hf") > 50


@pytest.mark.slow
@pytest.mark.parametrize("layout", SAVED)
def test_what_a_layout_loads_it_saves_bit_for_bit_each_rank_its_share(
    trained: Path, layout: str
) -> None:
    folder = trained / "saved" / layout / "weights"
    expected = TorchDistReader(trained / "run" / "step-2" / "weights")
    found = TorchDistReader(folder)
    assert found.names() == expected.names()
    assert any(name.startswith("optimizer.state.exp_avg_sq.vision.") for name in found.names())
    for name in found.names():
        rows = 95 if "word_embeddings" in name or "output_layer" in name else None  # not padding
        ours, theirs = found.tensor(name)[:rows], expected.tensor(name)[:rows]
        assert torch.equal(ours, theirs), name
    written = [sum(f.stat().st_size for f in folder.glob(f"__{rank}_*")) for rank in (0, 1)]
    if layout != "vpp2":  # whose first stage has the vision tower, too
        assert written[0] == pytest.approx(written[1], rel=0.15)


def optimizer_of(policy: Policy) -> MegatronOptimizer:
    assert policy.optimizer is not None
    return policy.optimizer


def gathered(policy: Policy) -> dict[str, Any]:
    """The state that earlier versions saved: Megatron's own, gathered on one rank."""
    model = model_state(policy)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = optimizer_of(policy).sharded_state_dict(dict(model), metadata=metadata)
    return {**model, "optimizer": state}


@pytest.mark.slow
def test_optimizer_state_has_megatrons_names_and_earlier_checkpoints_load(
    policy: Policy, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = Model(checkpoint=str(checkpoint), dtype="bfloat16")
    layouts = [Parallel(), Parallel(), Parallel(distributed_optimizer=False)]
    trained, *others = [Policy(policy.arch, cfg, layout, policy.mesh) for layout in layouts]
    for run in (trained, *others):
        load_weights(checkpoint, run)
        run.start_phase(OPTIMIZER, num_steps=8)
    step(trained, 0)
    save_checkpoint(tmp_path / "ours", trained, {}, checkpoint)
    monkeypatch.setattr("megatron_vrl.checkpoint.checkpoint.state_to_save", gathered)
    save_checkpoint(tmp_path / "megatron", trained, {}, checkpoint)
    ours, theirs = (TorchDistReader(tmp_path / by / "weights") for by in ("ours", "megatron"))
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names())
    expected = {id_of(trained, s): s.tensors for s in parameter_states(optimizer_of(trained))}
    for resumed in others:
        load_checkpoint(tmp_path / "megatron", resumed)
        assert step_count(optimizer_of(resumed)) == step_count(optimizer_of(trained)) == 1
        for state in parameter_states(optimizer_of(resumed)):
            for name, tensor in state.tensors.items():
                assert torch.equal(tensor, expected[id_of(resumed, state)][name])


@pytest.mark.parametrize("freeze", [False, True])
def test_the_planner_counts_the_bytes_of_a_save(
    policy: Policy, checkpoint: Path, freeze: bool
) -> None:
    model = Model(checkpoint=str(checkpoint), dtype="bfloat16", freeze_vision=freeze)
    cfg = RunConfig(run=Run(out_dir=""), model=model)
    run = Policy(policy.arch, model, cfg.parallel, policy.mesh)
    run.start_phase(OPTIMIZER, num_steps=8)
    saved = sum(shard.data.nbytes for shard in state_to_save(run)["shards"])
    counts = count_stage(policy.arch, model, cfg.parallel, 0)
    assert checkpoint_bytes(cfg, counts, dp_ranks=1) == saved
    assert checkpoint_bytes(cfg, counts, dp_ranks=8) == -(-saved // 8)


def id_of(run: Policy, state: ParameterState) -> str:
    named: dict[str, torch.nn.Parameter] = dict(run.chunks[0].named_parameters())
    return next(name for name, parameter in named.items() if parameter is state.parameter)


def test_weights_come_back_bit_equal_and_before_any_update(
    policy: Policy, checkpoint: Path, tmp_path: Path
) -> None:
    policy.start_phase(Optimizer(lr=1e-3), num_steps=1)
    save_checkpoint(tmp_path / "saved", policy, {"step": 0}, checkpoint)
    before = {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}
    with torch.no_grad():
        for param in policy.chunks[0].parameters():
            param.zero_()
    load_checkpoint(tmp_path / "saved", policy)
    for name, tensor in hf_tensors(policy.chunks):
        assert torch.equal(tensor, before[name]), name
    assert (hf_dir_of(tmp_path / "saved") / "config.json").exists()
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {
        "weights",
        "huggingface",
        "state.json",
        "CHECKSUMS",
    }


def test_a_checkpoint_does_not_know_the_device(
    policy: Policy, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step by the kernel of a GPU, a checkpoint, a step of a CPU: as without the checkpoint."""
    cfg = Model(checkpoint=str(checkpoint), dtype="bfloat16")
    runs = [Policy(policy.arch, cfg, Parallel(), policy.mesh) for _ in range(2)]
    for run in runs:
        load_weights(checkpoint, run)
        run.start_phase(OPTIMIZER, num_steps=8)
    monkeypatch.setitem(adamw.UPDATES, "cpu", adamw.fused_update)
    step(runs[0], 0)
    monkeypatch.undo()
    save_checkpoint(tmp_path / "gpu", runs[0], {}, checkpoint)
    load_checkpoint(tmp_path / "gpu", runs[1])
    unbroken, resumed = (step(run, 1)["weights"] for run in runs)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
    kept, loaded = (optimizer_of(run).chained_optimizers[0].optimizer for run in runs)
    assert [g["step"] for g in kept.param_groups] == [g["step"] for g in loaded.param_groups]
    for state, other in zip(kept.state.values(), loaded.state.values(), strict=True):
        assert set(state) == {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_background_save_holds_the_weights_as_they_were(
    policy: Policy, checkpoint: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}
    saver = Saver(tmp_path, policy, checkpoint, keep=2)
    saver.save("1", {"step": 1})
    with torch.no_grad():
        for param in policy.chunks[0].parameters():
            param.add_(1.0)
    assert latest(tmp_path) is None
    saver.finish()
    saver.poll()  # nothing is left to do
    assert latest(tmp_path) == tmp_path / "1"
    load_weights(tmp_path / "1", policy)
    for name, tensor in hf_tensors(policy.chunks):
        assert torch.equal(tensor, before[name]), name


def test_latest_is_the_marked_one_and_must_be_whole(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for age, name in enumerate("ba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
        os.utime(tmp_path / name / "state.json", (10 - age, 10 - age))
    (tmp_path / "latest").write_text("a")
    assert latest(tmp_path) == tmp_path / "a"
    (tmp_path / "c").mkdir()  # a save that was killed
    (tmp_path / "latest").write_text("c")
    assert latest(tmp_path) == tmp_path / "b"
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "b"


def test_old_and_incomplete_ones_go_and_the_pinned_one_stays(
    policy: Policy, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "killed.partial" / "weights").mkdir(parents=True)
    saver = Saver(tmp_path, policy, checkpoint, keep=1, asynchronous=False)
    for name in ("1", "2", "3"):
        saver.save(name, {}, pinned="1")
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "latest"}
    assert latest(tmp_path) == tmp_path / "3"


def test_a_full_disk_ends_a_background_save_with_one_sentence(
    policy: Policy, checkpoint: Path, tmp_path: Path
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        saver = Saver(tmp_path, policy, checkpoint, keep=1)
        saver.save("1", {})
        with pytest.raises(CheckpointError, match=rf"{tmp_path / '1'} cannot be written; its disk"):
            saver.finish()
        saver.finish()  # raised once
        assert not any(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
