"""Qwen2.5-VL's vision tower on Megatron modules.

The tower embeds patches, applies pre-norm blocks with 2D rotary embeddings (window attention, and
full attention in a few blocks), and merges each merge x merge square of patches into one token of
the language model.

Attention stays inside a temporal step. Therefore the temporal steps of a micro-batch are
partitioned over the tensor x context ranks: every rank holds the whole tower, encodes its temporal
steps, and all ranks gather the tokens. A rank's gradients of the tower are partial sums:
`policy/policy.py` sums them over the tensor ranks, and Megatron sums all gradients over the context
ranks.

The arithmetic follows transformers' `modeling_qwen2_5_vl.py`; tests compare the two.
"""

from collections.abc import Sequence
from typing import Any

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

from megatron_vrl.config import Model
from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.attention import packed_params
from megatron_vrl.models.layers import COMMON_CONFIG, RMSNorm, layer_spec
from megatron_vrl.models.qwen2_5_vl.inputs import Grid, VisionInputs, vision_inputs
from megatron_vrl.models.recompute import vision_recompute
from megatron_vrl.models.rotary import rotary_tables
from megatron_vrl.parallel.mesh import Mesh


def vision_config(
    arch: VisionArchitecture, cfg: Model, language: TransformerConfig
) -> TransformerConfig:
    """Return Megatron's TransformerConfig of the vision tower."""
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.mlp,
        num_attention_heads=arch.heads,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        **COMMON_CONFIG,
        **vision_recompute(cfg, arch.layers),
        gradient_accumulation_fusion=language.gradient_accumulation_fusion,
        params_dtype=language.params_dtype,
        bf16=language.params_dtype == torch.bfloat16,
        perform_initialization=False,
    )


class VisionTower(MegatronModule):
    """Encoder of the patches of any number of videos and images; returns one embedding per vision
    token."""

    def __init__(
        self, arch: Architecture, cfg: Model, mesh: Mesh, language: TransformerConfig
    ) -> None:
        config = vision_config(arch.vision, cfg, language)
        super().__init__(config=config)
        self.arch = arch.vision
        self.mesh = mesh
        self._dummy: VisionInputs | None = None
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
            param.tensor_model_parallel = False  # every tensor rank holds a full copy
            param.sequence_parallel = False

    def forward(self, output: Tensor, inputs: VisionInputs) -> Tensor:
        """Return embeddings [tokens, language hidden] of all temporal steps.

        `output` [P, C] is what `encode` returns. Every tensor and context rank must call it. Every
        rank gets all tokens.
        """
        tokens = self._merge(output, inputs)
        sharing = self.mesh.vision
        if sharing.size == 1:
            return tokens
        return _GatherRows.apply(tokens, inputs.counts, sharing.group, self.mesh.context.group)

    def encode_local(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the embeddings that `forward` returns, computed by this rank without
        communication."""
        inputs = vision_inputs(grids, self.arch, patches.device)
        return self._merge(self.encode(patches, inputs), inputs)

    def parameter_versions(self) -> tuple[tuple[int, int], ...]:
        """Return a fingerprint of the parameters: it changes when one is written in place or
        replaced."""
        return tuple((param.data_ptr(), param._version) for param in self.parameters())

    def dummy_token(self) -> Tensor:
        """Return the embedding of one black square of merge x merge patches.

        A batch without visuals adds 0 x this embedding, so that every parameter of the tower gets a
        gradient. Megatron's overlapped gradient reduction waits for all of them.
        """
        side, weight = self.arch.merge, self.patch_embed.weight
        if self._dummy is None:
            self._dummy = vision_inputs([(1, side, side)], self.arch, weight.device)
        black = weight.new_zeros(side**2, self.arch.patch_values)
        return self._merge(self.encode(black, self._dummy), self._dummy)

    def encode(self, patches: Tensor, inputs: VisionInputs) -> Tensor:
        """Return the blocks' output [P, C] for this rank's part of patches [all P, patch values].

        It is the merger's input.
        """
        if not inputs.plans:
            return patches.new_zeros(0, self.arch.hidden)
        hidden = self.patch_embed(patches[inputs.patches]).unsqueeze(1)  # [P, 1, C]
        hidden = self.blocks(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=rotary_tables(inputs.angles, self.config.params_dtype),
            packed_seq_params=packed_params(plan_of_layer=inputs.plans),
        )
        output: Tensor = hidden.squeeze(1)
        return output

    def _merge(self, output: Tensor, inputs: VisionInputs) -> Tensor:
        """Return the embeddings [tokens, language hidden] of this rank's patches."""
        if not inputs.plans:  # a rank without steps must still join the gather
            return output.new_zeros(0, self.merger.out.out_features, requires_grad=True)
        tokens: Tensor = self.merger(output)
        return tokens


class PatchMerger(torch.nn.Module):
    """RMSNorm and a two-layer MLP over the concatenated merge x merge patches of a token."""

    def __init__(
        self, config: TransformerConfig, arch: VisionArchitecture, out: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.width = arch.hidden * arch.merge**2
        self.norm = RMSNorm(config, arch.hidden, eps=1e-6)
        self.hidden = torch.nn.Linear(self.width, self.width, dtype=dtype)
        self.out = torch.nn.Linear(self.width, out, dtype=dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """Return [P / merge², language hidden] of patches [P, C]."""
        return self.out(F.gelu(self.hidden(self.norm(patches).view(-1, self.width))))


class _GatherRows(torch.autograd.Function):
    """All-gather of rows with different counts per rank.

    Backward: tensor ranks hold equal gradients of the gathered rows. A context rank holds only the
    gradients of tokens among its own rows of the sequence, so gradients are summed over `context`.
    Each rank then keeps the gradient of its own rows.
    """

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
