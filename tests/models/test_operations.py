"""Bounds on the operations and the kept bytes of a layer; no host read in a pass."""

import argparse
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from benches import ops
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vrl.algorithms import token_loss
from megatron_vrl.config import Algorithm, Parallel
from megatron_vrl.models.layers import RMSNorm
from megatron_vrl.models.logprob_head import Distribution, exponential_sums, slope_of_softmax
from megatron_vrl.models.swiglu import swiglu
from megatron_vrl.observe.op_counter import OpCounter
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy import policy as policies
from megatron_vrl.policy.policy import Policy

SIZES = {"frames": 4, "height": 112, "width": 112, "answer_tokens": 16, "group": 8}
BANNED = Distribution(temperature=0.9, banned=(1, 5, 900))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def made(mesh: Mesh, **model: str) -> tuple[Policy, list[Any]]:
    arguments = argparse.Namespace(**SIZES, **{"dtype": "bfloat16", "recompute": "none"} | model)
    arch = ops.architecture()
    return ops.make_policy(arch, mesh, arguments), ops.batches_of(arch, mesh, arguments)


@pytest.mark.parametrize(
    ("dtype", "language", "vision"), [("bfloat16", 90, 34), ("float32", 84, 32)]
)
def test_operations_of_a_layer(mesh: Mesh, dtype: str, language: int, vision: int) -> None:
    """Forward and backward of a language layer; forward of a frozen vision layer."""
    calls = ops.layer_calls(*made(mesh, dtype=dtype))
    for call, most, frozen in zip(calls, (language, vision), (False, True), strict=True):
        counter, _ = ops.count_layer(call, frozen=frozen)
        assert counter.total <= most, counter.operations
        assert not counter.host_reads and not counter.uploads


def test_operations_of_a_layer_with_the_fused_forms_of_a_gpu(mesh: Mesh) -> None:
    """Each fused kernel counts as one operation."""
    arguments = argparse.Namespace(**SIZES, dtype="bfloat16", recompute="none")
    counter, _ = ops.count_fused(ops.architecture(), mesh, arguments)
    assert counter.total <= 60, counter.operations
    fused = {"rms_norm": 2, "swiglu": 1, "rotary_embedding": 2, "flash": 2, "flash_backward": 2}
    assert {name: counter.operations[name] for name in fused} == fused
    assert not counter.host_reads and not counter.uploads


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_no_host_read_in_forward_and_backward(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    policy, batches = made(mesh, recompute=recompute)
    update = partial(policy.update, batches, partial(token_loss, cfg=Algorithm(kl=0.0)), BANNED)
    update(0)  # what is made once: banned ids, means of pixels
    counter = OpCounter()

    def counted(**arguments: Any) -> Any:
        with counter:
            return get_forward_backward_func()(**arguments)

    monkeypatch.setattr(policies, "get_forward_backward_func", lambda: counted)
    update(1)
    assert counter.total > 200
    assert not counter.host_reads
    lines = {place.split(" at ")[1].rpartition(":")[0].split("/")[-1] for place in counter.uploads}
    # frames, pinned on a GPU; Megatron's count of tokens, a number of 4 bytes
    assert lines <= {"arrays.py", "cpu.py"} and sum(counter.uploads.values()) <= 2


def test_an_update_reads_one_number_after_its_passes_and_its_metrics(mesh: Mesh) -> None:
    """The norm of all gradients, which also says whether they are finite; and the metrics."""
    policy, batches = made(mesh)
    update = partial(policy.update, batches, partial(token_loss, cfg=Algorithm(kl=0.0)), BANNED)
    update(0)
    with OpCounter() as counter:
        update(1)
    on_device = [place for place in counter.host_reads if "inputs.py" not in place]
    assert len(on_device) == 2, counter.host_reads  # inputs.py: tensors of the host alone


def test_the_mlp_keeps_three_values_of_five(mesh: Mesh) -> None:
    language, _ = ops.layer_calls(*made(mesh))
    _, saved = ops.count_layer(ops.mlp_of(language))
    layer: Any = language[0]
    _, args, kwargs = language
    rows = len(args[0] if args else kwargs["hidden_states"])
    assert saved == 3 * 2 * rows * layer.config.ffn_hidden_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_equals_autograd_to_the_bit(dtype: torch.dtype) -> None:
    noise = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for activation in (swiglu, by_autograd):
        leaf = noise.clone().requires_grad_()
        out = activation(leaf)
        out.backward(out.detach().sin())
        assert leaf.grad is not None
        results.append((out, leaf.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def by_autograd(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_equals_torch(dtype: torch.dtype) -> None:
    """The result to the bit; gradients as near to those in float64 as torch's are."""
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(7, 1, 64, generator=noise).to(dtype)
    weight = torch.randn(64, generator=noise).to(dtype)
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1)
    ours = RMSNorm(config, 64).to(dtype)
    theirs, exact = (torch.nn.RMSNorm(64, eps=1e-6, dtype=kind) for kind in (dtype, torch.float64))
    found = [outcome(norm, x, weight) for norm in (ours, theirs, exact)]
    assert torch.equal(found[0][0], found[1][0])
    for mine, torchs, wanted in zip(*(gradients for _, gradients in found), strict=True):
        torch.testing.assert_close(mine, torchs)
        assert (mine - wanted).norm() <= 1.1 * (torchs - wanted).norm()


def outcome(norm: torch.nn.RMSNorm, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        norm.weight.copy_(weight)
    leaf = x.detach().to(norm.weight.dtype).clone().requires_grad_()
    out = norm(leaf)
    return out, torch.autograd.grad(out, (leaf, norm.weight), out.detach().sin())


def test_the_parts_of_the_head_compile_to_one_graph_each() -> None:
    """Sizes are symbols. The graphs of a GPU, executed by torch, give equal bits."""
    noise = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 33, generator=noise)
    rows = [torch.randn(5, generator=noise) for _ in range(4)]
    for function, arguments in ((exponential_sums, rows[:1]), (slope_of_softmax, rows)):
        graph = torch.compile(
            inspect.unwrap(function), dynamic=True, fullgraph=True, backend="eager"
        )
        wanted = function(logits.clone(), torch.empty_like(logits), *arguments)
        torch.testing.assert_close(graph(logits.clone(), None, *arguments), wanted, rtol=0, atol=0)
