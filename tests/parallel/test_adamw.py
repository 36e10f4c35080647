"""AdamW compared with torch's: equal updates from a different state layout."""

import pytest
import torch

from megatron_vrl.parallel.adamw import AdamW


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
