"""DeepStack (arXiv 2406.04334): vision features added to hidden states after the first layers.

The vision tower gives each vision token one embedding and a feature per DeepStack merger. Language
layer i adds feature i to the hidden states of the vision tokens. Megatron's TransformerBlock passes
the argument `context` of cross-attention from layer to layer, also through its recompute, so the
features travel as `context` and their gradients arrive without further code.
"""

from dataclasses import replace
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vrl.models.attention import PlannedSeqParams
from megatron_vrl.models.layers import LayerModules, RMSNorm, layer_spec


class DeepStackLayer(TransformerLayer):
    """TransformerLayer that adds the first feature of `context` and passes on the others."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        context: Tensor | None = None,
        packed_seq_params: PlannedSeqParams,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states [L (/ tensor), 1, C] and the features of the next layers.

        `context` holds features [D, n, C] of this layer and the next ones, for the rows
        `packed_seq_params.deepstack_rows` [n]; None: no feature is left.
        """
        hidden, _ = super().forward(hidden_states, packed_seq_params=packed_seq_params, **others)
        if context is None:
            return hidden, None
        rows = packed_seq_params.deepstack_rows
        assert rows is not None
        hidden = hidden.index_add(0, rows, context[0][:, None])
        return hidden, context[1:] if len(context) > 1 else None


def language_layer(parts: LayerModules) -> ModuleSpec:
    """Return the spec of a language layer: a norm of each query and key head, and DeepStack.

    The norm of heads is always ours, since Megatron sums its gradient over tensor ranks by name.
    """
    return layer_spec(replace(parts, head_norm=RMSNorm), DeepStackLayer)
