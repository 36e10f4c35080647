"""Qwen3-VL's vision tower on Megatron modules.

The tower embeds patches, adds learned position embeddings (a square table, interpolated to the
size of the temporal step), applies pre-norm blocks with 2D rotary embeddings and full attention
inside a temporal step, and merges each merge x merge square of patches into one token of the
language model. Further mergers make the DeepStack features from the outputs of earlier blocks.

The arithmetic follows transformers' `modeling_qwen3_vl.py`; tests compare the two.
"""

from dataclasses import replace
from typing import Any

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
from megatron_vrl.models.layers import COMMON_CONFIG, MEGATRON_MODULES, layer_spec
from megatron_vrl.models.qwen3_vl.vision_inputs import tower_inputs
from megatron_vrl.models.qwen3_vl.weight_map import segments
from megatron_vrl.models.recompute import vision_recompute
from megatron_vrl.models.rotary import rotary_tables
from megatron_vrl.models.vision_inputs import VisionInputs
from megatron_vrl.models.vision_tower import VisionTower, without_groups
from megatron_vrl.parallel.mesh import Mesh

NORM_EPS = 1e-6


def vision_config(
    arch: VisionArchitecture, cfg: Model, language: TransformerConfig
) -> TransformerConfig:
    """Return Megatron's TransformerConfig of the vision tower."""
    mlp = {"gated_linear_unit": False, "activation_func": F.gelu}  # GeluTanh replaces the function
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.mlp,
        num_attention_heads=arch.heads,
        layernorm_epsilon=NORM_EPS,
        add_bias_linear=True,
        add_qkv_bias=True,
        **COMMON_CONFIG | mlp | {"normalization": "LayerNorm"},
        **vision_recompute(cfg, arch.layers),
        gradient_accumulation_fusion=language.gradient_accumulation_fusion,
        params_dtype=language.params_dtype,
        bf16=language.params_dtype == torch.bfloat16,
        perform_initialization=False,
    )


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with the arguments of Megatron's layer specs."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = NORM_EPS, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps)


class GeluTanh(torch.nn.Module):
    """Activation module of Megatron's MLP: the tanh form of GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, values: Tensor) -> Tensor:
        """Return the GELU of `values`."""
        return F.gelu(values, approximate="tanh")

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return {}: Megatron's MLP asks each of its modules, and this one has no parameters."""
        return {}


class Qwen3VisionTower(VisionTower):
    """Tower with learned positions and full attention.

    A vision token's embedding is the last merger's C channels, then those of each DeepStack
    merger.
    """

    def __init__(
        self, arch: Architecture, cfg: Model, mesh: Mesh, language: TransformerConfig
    ) -> None:
        config = vision_config(arch.vision, cfg, language)
        super().__init__(arch.vision, mesh, config, tower_inputs)
        self.width = arch.vision_width
        dtype = config.params_dtype
        self.patch_embed = torch.nn.Linear(self.arch.patch_values, self.arch.hidden, dtype=dtype)
        self.positions = torch.nn.Embedding(
            self.arch.position_grid**2, self.arch.hidden, dtype=dtype
        )
        self.blocks = torch.nn.ModuleList(
            _blocks(config, len(part), mesh) for part in segments(self.arch)
        )
        self.merger = Mergers(config, self.arch, arch.hidden)
        self.mark_copies()

    def encode(self, patches: Tensor, inputs: VisionInputs) -> Tensor:
        """Return block outputs [1 + D, P, C]: the last block's, then those of the D blocks with a
        DeepStack merger."""
        ends = [self.arch.layers, *(layer + 1 for layer in self.arch.deepstack_layers)]
        if not inputs.plans:
            return patches.new_zeros(len(ends), 0, self.arch.hidden)
        hidden = self.patch_embed(patches[inputs.patches])
        hidden = (hidden + self._learned_positions(inputs).to(hidden.dtype)).unsqueeze(1)
        tables = rotary_tables(inputs.angles, self.config.params_dtype)
        outputs: dict[int, Tensor] = {}  # number of blocks -> their output
        for blocks, part in zip(self.blocks, segments(self.arch), strict=True):
            hidden = blocks(
                hidden_states=hidden,
                attention_mask=None,
                rotary_pos_emb=tables,
                packed_seq_params=packed_params(plan_of_layer=inputs.plans),
            )  # [P, 1, C]
            outputs[part.stop] = hidden.squeeze(1)
        return torch.stack([outputs[end] for end in ends])

    def _learned_positions(self, inputs: VisionInputs) -> Tensor:
        """Return float32 position embeddings [P, C]."""
        learned = inputs.learned
        assert learned is not None
        corners = self.positions(learned.cells) * learned.weights[:, :, None]  # [U, 4, C]
        return corners.sum(1).index_select(0, learned.place)

    def merge(self, output: Tensor, inputs: VisionInputs) -> Tensor:
        """Return the embeddings [tokens, (1 + D) * language hidden]."""
        if not inputs.plans:  # a rank without steps must still join the gather
            return output.new_zeros(0, self.width, requires_grad=True)
        tokens: Tensor = self.merger(output)
        return tokens


def _blocks(config: TransformerConfig, layers: int, mesh: Mesh) -> TransformerBlock:
    """Return a stack of `layers` blocks that this rank computes alone."""
    parts = replace(MEGATRON_MODULES, norm=LayerNorm, activation=GeluTanh)
    return TransformerBlock(
        config=replace(config, num_layers=layers),
        spec=TransformerBlockSubmodules(layer_specs=[layer_spec(parts)] * layers, layer_norm=None),
        post_layer_norm=False,
        pg_collection=without_groups(mesh),
    )


class Mergers(torch.nn.Module):
    """Merger of the last block's output, and one for each DeepStack feature."""

    def __init__(self, config: TransformerConfig, arch: VisionArchitecture, out: int) -> None:
        super().__init__()
        self.last = PatchMerger(config, arch, out, norm_width=arch.hidden)
        merged = arch.hidden * arch.merge**2
        self.deepstack = torch.nn.ModuleList(
            PatchMerger(config, arch, out, norm_width=merged) for _ in arch.deepstack_layers
        )

    def forward(self, outputs: Tensor) -> Tensor:
        """Return embeddings [tokens, (1 + D) * language hidden] of block outputs [1 + D, P, C]."""
        mergers = [self.last, *self.deepstack]
        parts = [merger(output) for merger, output in zip(mergers, outputs, strict=True)]
        return torch.cat(parts, dim=1)


class PatchMerger(torch.nn.Module):
    """LayerNorm and a two-layer MLP over the concatenated merge x merge patches of a token.

    The norm is over the channels of a patch, or over those of the concatenated patches (DeepStack):
    `norm_width` channels.
    """

    def __init__(
        self, config: TransformerConfig, arch: VisionArchitecture, out: int, *, norm_width: int
    ) -> None:
        super().__init__()
        self.width, self.norm_width = arch.hidden * arch.merge**2, norm_width
        self.norm = LayerNorm(config, norm_width)
        self.hidden = torch.nn.Linear(self.width, self.width, dtype=config.params_dtype)
        self.out = torch.nn.Linear(self.width, out, dtype=config.params_dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """Return [P / merge², language hidden] of patches [P, C]."""
        normed = self.norm(patches.view(-1, self.norm_width)).view(-1, self.width)
        return self.out(F.gelu(self.hidden(normed)))
