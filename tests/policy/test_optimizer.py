"""The optimizer of every device: the first step without Transformer Engine and apex, and the fused
kernel of a GPU compared with the CPU's operations.

The stub is the device alone: the CPU platform of Megatron, whose flags of this process are those of
a GPU machine on which neither library is installed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel import adamw
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from tests.tiny import GROUPS, token_loss
from tests.tiny_models import hf_model, save

# Both compute one AdamW step of float32 from equal gradients; they differ in the order of the bias
# corrections, so by a few roundings of the step, whose size is at most lr (here 1e-3).
FEW_ROUNDINGS: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-3 * 1e-5}
SEPARATE = [pytest.param(True, id="distributed"), pytest.param(False, id="whole")]


class FusedAdam:
    """FusedAdam of a library that is installed: nobody may create it."""

    def __init__(self, *_: object, **__: object) -> None:
        raise AssertionError("Megatron created another optimizer than ours")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("optimizer") / "hf")


@pytest.fixture(scope="module", params=["no library", "Transformer Engine"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """Megatron's flags as after its import without both libraries, and with the first."""
    alone = request.param == "no library"
    adam = torch.optim.Adam if alone else FusedAdam
    for module, name, value in (
        (mcore_optimizer, "Adam", adam),
        (mcore_optimizer, "USING_PYTORCH_OPTIMIZER", alone),
        (distrib_optimizer, "Adam", adam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", not alone),
        (distrib_optimizer, "USING_TE_OPTIMIZER", not alone),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", False),
    ):
        setattr(module, name, value)
    yield init_mesh(Parallel(), seed=1)
    close_mesh()
    distrib_optimizer.USING_TE_OPTIMIZER = False


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of the update of a GPU, which runs in place of the CPU's."""
    calls: list[int] = []

    def counted(*arguments: Any) -> None:
        calls.append(len(arguments[2]))
        adamw.fused_update(*arguments)

    monkeypatch.setitem(adamw.UPDATES, "cpu", counted)
    return calls


def policy_of(checkpoint: Path, mesh: Mesh, distributed: bool = True) -> Policy:
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    parallel = Parallel(distributed_optimizer=distributed)
    policy = Policy(read_architecture(checkpoint), cfg, parallel, mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-3, weight_decay=0.1), num_steps=4)
    return policy


def step(policy: Policy) -> dict[str, torch.Tensor]:
    batches = plan_batches(GROUPS[:1], GROUPS[0], Batch(tokens=10_000), policy.mesh)
    assert policy.update(batches, token_loss, Distribution(), 0).applied
    return {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}


@pytest.mark.parametrize("distributed", SEPARATE)
def test_the_first_step_of_a_gpu(
    checkpoint: Path,
    mesh: Mesh,
    fused: list[int],
    monkeypatch: pytest.MonkeyPatch,
    distributed: bool,
) -> None:
    """Megatron's own path for torch's AdamW died here (KeyError: 'step')."""
    on_gpu = step(policy_of(checkpoint, mesh, distributed))
    assert sum(fused) == len(list(policy_of(checkpoint, mesh).chunks[0].parameters()))
    monkeypatch.undo()
    on_cpu = step(policy_of(checkpoint, mesh, distributed))
    start = dict(hf_tensors(policy_of(checkpoint, mesh).chunks))
    for name, tensor in on_gpu.items():
        assert not torch.equal(tensor, start[name]), name
        torch.testing.assert_close(tensor, on_cpu[name], **FEW_ROUNDINGS, msg=name)
