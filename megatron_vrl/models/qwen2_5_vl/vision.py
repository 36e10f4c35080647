"""Qwen2.5-VL's vision tower on Megatron modules.

The tower embeds patches, applies pre-norm blocks with 2D rotary embeddings (window attention, and
full attention in a few blocks), and merges each merge x merge square of patches into one token of
the language model.

The arithmetic follows transformers' `modeling_qwen2_5_vl.py`; tests compare the two.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
from megatron_vrl.models.qwen2_5_vl.attention_plans import vision_plans
from megatron_vrl.models.recompute import vision_recompute
from megatron_vrl.models.rotary import rotary_tables
from megatron_vrl.models.vision_inputs import Grid, VisionInputs, share_steps, vision_inputs
from megatron_vrl.models.vision_tower import VisionTower, without_groups
from megatron_vrl.parallel.mesh import Axis, Mesh


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
        add_qkv_bias=True,
        **COMMON_CONFIG,
        **vision_recompute(cfg, arch.layers),
        gradient_accumulation_fusion=language.gradient_accumulation_fusion,
        params_dtype=language.params_dtype,
        bf16=language.params_dtype == torch.bfloat16,
        perform_initialization=False,
    )


def tower_inputs(
    grids: Sequence[Grid], arch: VisionArchitecture, device: torch.device, sharing: Axis | None
) -> VisionInputs:
    """Return the index tensors of this rank's temporal steps, with plans of windows for most
    blocks."""
    share = share_steps(grids, arch.merge, sharing)
    plans = vision_plans(share.steps, arch, device) if share.steps else {}
    return vision_inputs(share, arch, plans, device)


class Qwen25VisionTower(VisionTower):
    """Tower with window attention and one merger."""

    def __init__(
        self, arch: Architecture, cfg: Model, mesh: Mesh, language: TransformerConfig
    ) -> None:
        config = vision_config(arch.vision, cfg, language)
        super().__init__(arch.vision, mesh, config, tower_inputs)
        self.patch_embed = torch.nn.Linear(
            self.arch.patch_values, self.arch.hidden, bias=False, dtype=config.params_dtype
        )
        spec = layer_spec()
        self.blocks = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[spec] * self.arch.layers, layer_norm=None),
            post_layer_norm=False,
            pg_collection=without_groups(mesh),
        )
        self.merger = PatchMerger(config, self.arch, arch.hidden, config.params_dtype)
        self.mark_copies()

    def encode(self, patches: Tensor, inputs: VisionInputs) -> Tensor:
        """Return the blocks' output [P, C]."""
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

    def merge(self, output: Tensor, inputs: VisionInputs) -> Tensor:
        """Return the merger's tokens [tokens, language hidden]."""
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
