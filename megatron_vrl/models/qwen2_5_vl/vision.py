"""Qwen2.5-VL's vision tower on Megatron modules.

Patches are embedded, run through pre-norm blocks with 2D rotary angles (window attention, full
attention in a few blocks), and each merge x merge square becomes one token of the language model.
Attention never crosses a temporal step, so the steps of all visuals of a micro-batch are dealt out
over the tensor x context ranks: every rank holds the whole tower, does its share of the work, and
the tokens are gathered. Gradients of the tower are therefore partial: `policy/policy.py` sums
them over the tensor ranks, and Megatron over the context ranks, as it does all gradients.

Source of the arithmetic: transformers' `modeling_qwen2_5_vl.py`, against which it is tested.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.layers import BOTH_TOWERS, RECOMPUTE, RMSNorm, layer_spec, packed
from megatron_vrl.models.qwen2_5_vl.attention_plans import vision_plans
from megatron_vrl.parallel.mesh import Mesh

Grid = tuple[int, int, int]  # temporal steps; height and width in patches


def vision_config(arch: VisionArchitecture, language: TransformerConfig) -> TransformerConfig:
    recompute = "full" if language.recompute_granularity == "full" else "none"
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.mlp,
        num_attention_heads=arch.heads,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        **BOTH_TOWERS,
        **RECOMPUTE[recompute],
        gradient_accumulation_fusion=language.gradient_accumulation_fusion,
        params_dtype=language.params_dtype,
        bf16=language.params_dtype == torch.bfloat16,
        perform_initialization=False,
    )


class VisionTower(MegatronModule):
    """Patches of any number of videos and images -> one embedding for each vision token."""

    def __init__(self, arch: Architecture, mesh: Mesh, language: TransformerConfig) -> None:
        config = vision_config(arch.vision, language)
        super().__init__(config=config)
        self.arch = arch.vision
        self.mesh = mesh
        alone = ProcessGroupCollection(
            tp=mesh.alone, pp=mesh.alone, cp=mesh.alone, dp=mesh.alone, tp_cp=mesh.alone
        )
        self.patch_embed = torch.nn.Linear(
            self.arch.patch_values, self.arch.hidden, bias=False, dtype=config.params_dtype
        )
        spec = layer_spec()
        self.blocks = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[spec] * self.arch.layers, layer_norm=None),
            post_layer_norm=False,
            pg_collection=alone,
        )
        self.merger = PatchMerger(config, self.arch, arch.hidden, config.params_dtype)
        for param in self.parameters():
            param.tensor_model_parallel = False  # a full copy per rank
            param.sequence_parallel = False

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches [P, patch values] of all temporal steps in order -> [tokens, language hidden].

        Every tensor and context rank calls it with the same patches and gets all tokens.
        """
        sharing = self.mesh.vision
        steps = [(h, w) for t, h, w in grids for _ in range(t)]
        sizes = [h * w for h, w in steps]
        bounds = shard_steps(sizes, sharing.size)
        first, last = bounds[sharing.rank]
        begin = sum(sizes[:first])
        mine = patches[begin : begin + sum(sizes[first:last])]
        tokens = self._encode(mine, steps[first:last])
        if sharing.size == 1:
            return tokens
        counts = [sum(sizes[a:b]) // self.arch.merge**2 for a, b in bounds]
        return _GatherRows.apply(tokens, counts, sharing.group, self.mesh.context.group)

    def alone(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The same by this rank for itself; no other need call it."""
        return self._encode(patches, [(h, w) for t, h, w in grids for _ in range(t)])

    def written(self) -> tuple[tuple[int, int], ...]:
        """Another value after any of the parameters was written to or exchanged."""
        return tuple((param.data_ptr(), param._version) for param in self.parameters())

    def nothing(self) -> Tensor:
        """The token of a black square: with it a batch of text alone touches every parameter, as
        Megatron's overlapped sum of gradients expects of each."""
        side = self.arch.merge
        weight = self.patch_embed.weight
        return self._encode(weight.new_zeros(side**2, self.arch.patch_values), [(side, side)])

    def _encode(self, patches: Tensor, steps: list[tuple[int, int]]) -> Tensor:
        if not steps:  # a rank without work still joins the gather
            return patches.new_zeros(0, self.merger.out.out_features, requires_grad=True)
        device = patches.device
        hidden = self.patch_embed(patches).unsqueeze(1)  # [P, 1, C]
        hidden = self.blocks(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=rotary_angles(steps, self.arch, device),
            packed_seq_params=packed(
                len(patches), device, plan_of_layer=vision_plans(steps, self.arch, device)
            ),
        )
        return self.merger(hidden.squeeze(1))


class PatchMerger(torch.nn.Module):
    """RMSNorm, then the merge x merge patches of a token side by side through a two-layer MLP."""

    def __init__(
        self, config: TransformerConfig, arch: VisionArchitecture, out: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.width = arch.hidden * arch.merge**2
        self.norm = RMSNorm(config, arch.hidden, eps=1e-6)
        self.hidden = torch.nn.Linear(self.width, self.width, dtype=dtype)
        self.out = torch.nn.Linear(self.width, out, dtype=dtype)

    def forward(self, patches: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(self.norm(patches).view(-1, self.width))))


def shard_steps(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """Contiguous [first, last) shares of the steps, cut before the step that passes a share."""
    ends = np.cumsum(sizes) if len(sizes) else np.zeros(0)
    total = float(ends[-1]) if len(sizes) else 0.0
    cuts = [0]
    for rank in range(1, ranks):
        cuts.append(int(np.searchsorted(ends, total * rank / ranks, side="right")))
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))


def rotary_angles(
    steps: Sequence[tuple[int, int]], arch: VisionArchitecture, device: torch.device
) -> Tensor:
    """[P, 1, 1, D] angles: a quarter of a head's channels turn with the row, a quarter with the
    column, and both are repeated for the second half (rotate-half convention)."""
    quarter = arch.hidden // arch.heads // 4
    frequency = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    m = arch.merge
    coordinates = []
    for height, width in steps:
        rows, cols = np.indices((height, width))
        merged = [
            axis.reshape(height // m, m, width // m, m).swapaxes(1, 2).reshape(-1)
            for axis in (rows, cols)
        ]
        coordinates.append(np.stack(merged, axis=1))  # [patches of the step, 2]
    at = torch.from_numpy(np.concatenate(coordinates)).float()
    half = (at[:, :, None] * frequency).flatten(1)  # [P, D / 2]
    return torch.cat([half, half], dim=-1)[:, None, None, :].to(device)


class _GatherRows(torch.autograd.Function):
    """Concatenate the ranks' rows. In the backward pass tensor ranks hold equal gradients, and a
    context rank those of the tokens among its rows: the latter are summed, and the own kept."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        counts: list[int],
        group: dist.ProcessGroup,
        context: dist.ProcessGroup,
    ) -> Tensor:
        ctx.context = context
        ctx.begin = sum(counts[: group.rank()])
        ctx.count = counts[group.rank()]
        padded = [rows.new_empty(max(counts), rows.shape[1]) for _ in counts]
        own = F.pad(rows.detach(), (0, 0, 0, max(counts) - len(rows)))
        dist.all_gather(padded, own, group=group)
        parts = [part[:count] for part, count in zip(padded, counts, strict=True)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        if ctx.context.size() > 1:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.context)
        return grad[ctx.begin : ctx.begin + ctx.count].contiguous(), None, None, None
