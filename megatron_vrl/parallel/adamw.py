"""AdamW (arXiv 1711.05101) of this program, which `install()` makes Megatron's optimizer.

Every device uses this class, so a checkpoint does not depend on what is installed: megatron.core
alone would take FusedAdam of Transformer Engine or of apex, else torch's AdamW. Its own path for
torch's AdamW fails in the first step (megatron-core 0.16.1): the optimizer state is created without
the entry `step` that torch reads.

The state has FusedAdam's layout, which Megatron's distributed optimizer expects: `exp_avg` and
`exp_avg_sq` per parameter, and one integer `step` per param group.

The update of a device is one of UPDATES. On CUDA it is torch's fused kernel, which reads and writes
each tensor once and allocates nothing. On other devices it is a sequence of `_foreach` operations,
whose bits the exactness tests rely on.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

Tensors = list[Tensor]  # one tensor per parameter
Update = Callable[[dict[str, Any], float, Tensors, Tensors, Tensors, Tensors], None]


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
        self.gradient_scale = 1.0  # factor of all gradients in the next steps, as clipping sets it

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is ignored."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                update = UPDATES.get(params[0].device.type, foreach_update)
                moments = [self._moments(param) for param in params]
                update(
                    group,
                    self.gradient_scale,
                    params,
                    [param.grad for param in params if param.grad is not None],
                    [state["exp_avg"] for state in moments],
                    [state["exp_avg_sq"] for state in moments],
                )

    def _moments(self, param: Tensor) -> dict[str, Tensor]:
        """Return the moments of `param`, created as zeros at the first call."""
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def foreach_update(
    group: dict[str, Any],
    scale: float,
    params: Tensors,
    grads: Tensors,
    first: Tensors,
    second: Tensors,
) -> None:
    """Update `params` of one param group in place, from their gradients times `scale`."""
    if scale != 1:
        torch._foreach_mul_(grads, scale)
    beta1, beta2 = group["betas"]
    correction1 = 1 - beta1 ** group["step"]
    correction2 = 1 - beta2 ** group["step"]
    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominator = torch._foreach_div(second, correction2)
    torch._foreach_sqrt_(denominator)
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / correction1)


def fused_update(
    group: dict[str, Any],
    scale: float,
    params: Tensors,
    grads: Tensors,
    first: Tensors,
    second: Tensors,
) -> None:
    """Update `params` of one param group in place, by torch's fused kernel (CUDA and CPU).

    The kernel scales gradients as it reads them: clipping is no pass of its own.
    """
    step = torch.full((), float(group["step"]), device=params[0].device)
    divisor = None if scale == 1 else torch.full((), 1 / scale, device=params[0].device)
    torch._fused_adamw_(
        params,
        grads,
        first,
        second,
        [],
        [step] * len(params),  # the kernel only reads it
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
    )


UPDATES: dict[str, Update] = {"cuda": fused_update, "cpu": foreach_update}  # by device type

# (module, attribute, value) by which megatron.core creates and accepts AdamW
MEGATRON = (
    (mcore_optimizer, "Adam", AdamW),
    (mcore_optimizer, "USING_PYTORCH_OPTIMIZER", False),  # else Adam is not used
    (distrib_optimizer, "Adam", AdamW),
    (distrib_optimizer, "HAVE_APEX_OR_TE", True),  # `step` is in the param group
    (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
)


def install() -> None:
    """Make AdamW the optimizer that megatron.core creates in this process."""
    for module, attribute, value in MEGATRON:
        setattr(module, attribute, value)
