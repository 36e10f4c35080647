"""Megatron's optimizer for one training phase, and its learning-rate schedule."""

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_vrl.config import Optimizer
from megatron_vrl.parallel.mcore_compat import gradients_for_norm


def make_optimizer(
    chunks: list[DistributedDataParallel], cfg: Optimizer, *, bf16: bool, distributed: bool
) -> MegatronOptimizer:
    """Return a new AdamW optimizer with float32 main weights. Every rank calls it.

    Biases and norms have no weight decay, as is Megatron's default.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=0.0,  # Megatron requires it; `learning_rate` below sets the rate
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.betas[0],
            adam_beta2=cfg.betas[1],
            clip_grad=cfg.clip_grad,
            bf16=bf16,
            params_dtype=chunks[0].module.config.params_dtype,
            use_distributed_optimizer=distributed,
        ),
        chunks,
    )
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:  # None: all parameters of this rank are frozen
            part.init_state_fn(part.optimizer)  # a checkpoint may be loaded before the first update
    return optimizer


@torch.no_grad()
def clipped_step(optimizer: MegatronOptimizer, max_norm: float) -> float:
    """Make one step with gradients clipped to `max_norm`, and return their norm before clipping.

    Without a finite norm no weight changes. Every rank calls it, and all get the same norm. It
    equals Megatron's `optimizer.step()`, which reads each parameter's norm on the host where
    Transformer Engine and apex are missing. Here one pass finds the norm and what is not finite,
    and AdamW clips.
    """
    optimizer.prepare_grads()
    norm = _norm(optimizer)
    if not math.isfinite(norm):
        return norm
    scale = max_norm / (norm + 1e-6)
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.optimizer.gradient_scale = scale if 0 < scale < 1 else 1.0
    optimizer.step_with_ready_grads()
    return norm


def _norm(optimizer: MegatronOptimizer) -> float:
    """Return the norm of all gradients of all ranks, each parameter counted once."""
    grads = [g for part in optimizer.chained_optimizers for g in gradients_for_norm(part)]
    total = torch.zeros((), device=torch.cuda.current_device())
    if grads:
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) ** 2
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return math.sqrt(total.item())


def learning_rate(cfg: Optimizer, step: int, num_steps: int) -> float:
    """Return the learning rate of the update after `step` updates: linear warm-up, then decay."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.decay == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
    return cfg.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
