"""AdamW compared with torch's: equal updates from a different state layout."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vrl.parallel.adamw import AdamW, foreach_update, fused_update


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_equals_torch(weight_decay: float, betas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    runs = []
    for maker in (AdamW, torch.optim.AdamW):
        params = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = maker(params, lr=0.01, betas=betas, weight_decay=weight_decay)
        generator = torch.Generator().manual_seed(1)
        for step in range(20):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        runs.append(params)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_state_is_that_of_fused_adam() -> None:
    param, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([param, unused], lr=0.1, capturable=False)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}
    assert unused not in optimizer.state  # a parameter without gradient is left alone
    assert torch.equal(unused, torch.ones(2))


@pytest.mark.parametrize(("weight_decay", "scale"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.3)])
def test_the_kernel_of_a_gpu_computes_what_the_cpu_computes(
    weight_decay: float, scale: float
) -> None:
    """torch's fused kernel runs on CPU tensors, too: 20 steps with our arguments.

    Both are float32 and order the bias corrections differently. A step is at most lr = 0.01, so
    20 steps with a few roundings each stay within 1e-7, beside the rounding of the weights.
    """
    runs = []
    for update in (foreach_update, fused_update):
        torch.manual_seed(0)
        params = [torch.randn(5, 3), torch.randn(7)]
        first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))
        group: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
        for step in range(1, 21):
            grads = [torch.randn(param.shape) for param in params]
            now = group | {"step": step, "lr": 0.01 / step}
            update(now, scale, params, grads, first, second)
        runs.append(params + first + second)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_fused_kernel_allocates_no_list_of_tensors(scale: float) -> None:
    """A count of the operations: one kernel that clips, too; step and scale are its new tensors."""
    params, grads, first, second = ([torch.zeros(4) for _ in range(3)] for _ in range(4))
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1, "lr": 0.1}
    with Operations() as seen:
        fused_update(group, scale, params, grads, first, second)
    assert seen.names == ["full"] * (1 + (scale != 1)) + ["_fused_adamw_"]


class Operations(TorchDispatchMode):
    """Record the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})
