"""AdamW (arXiv 1711.05101) with the state layout of FusedAdam of apex and Transformer Engine.

torch's AdamW keeps a `step` tensor in every parameter's state; FusedAdam keeps one integer per
param group. Megatron's distributed optimizer saves and loads only FusedAdam's layout. The CPU
therefore uses this class where a GPU uses FusedAdam, and checkpoints move between the two.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class AdamW(torch.optim.Optimizer):
    """AdamW with state `exp_avg` and `exp_avg_sq` per parameter and `step` per param group."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,  # FusedAdam's other options (capturable, adam_w_mode) are ignored
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is ignored."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        """Update `params` of one param group in place."""
        beta1, beta2 = group["betas"]
        grads = [param.grad for param in params if param.grad is not None]
        first = [self._moments(param)["exp_avg"] for param in params]
        second = [self._moments(param)["exp_avg_sq"] for param in params]
        correction1 = 1 - beta1 ** group["step"]
        correction2 = 1 - beta2 ** group["step"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(torch._foreach_div(second, correction2))
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / correction1)

    def _moments(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the moments of `param`, created as zeros at the first call."""
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
