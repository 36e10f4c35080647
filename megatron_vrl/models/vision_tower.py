"""Vision tower on all ranks that share its work; a family's tower is a subclass.

Attention stays inside a temporal step. Therefore the temporal steps of a micro-batch are
partitioned over the tensor x context ranks: every rank holds the whole tower, encodes its temporal
steps, and all ranks gather the tokens. A rank's gradients of the tower are partial sums:
`policy/policy.py` sums them over the tensor ranks, and Megatron sums all gradients over the context
ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vrl.models.architecture import VisionArchitecture
from megatron_vrl.models.vision_inputs import Grid, MakeVisionInputs, VisionInputs
from megatron_vrl.parallel.mesh import Mesh

MERGER = "merger"  # parameters whose names begin so belong to the mergers


class VisionTower(MegatronModule, ABC):
    """Encoder of the patches of any number of videos and images; returns one embedding per vision
    token.

    A subclass defines `patch_embed`, `blocks` (Megatron's TransformerBlock), mergers with names
    that begin with `merger`, and the two abstract methods. It ends its constructor with
    `mark_copies`.
    """

    patch_embed: torch.nn.Linear
    blocks: Any

    def __init__(
        self,
        arch: VisionArchitecture,
        mesh: Mesh,
        config: TransformerConfig,
        inputs: MakeVisionInputs,
    ) -> None:
        super().__init__(config=config)
        self.arch = arch
        self.mesh = mesh
        self._inputs = inputs
        self._dummy: VisionInputs | None = None

    @abstractmethod
    def encode(self, patches: Tensor, inputs: VisionInputs) -> Tensor:
        """Return the mergers' input [P, any] for this rank's part of patches [all P, patch values].

        A frozen tower's is kept for all passes of a step.
        """

    @abstractmethod
    def merge(self, output: Tensor, inputs: VisionInputs) -> Tensor:
        """Return the embeddings [tokens, `Architecture.vision_width`] of this rank's patches, from
        what `encode` returned.

        A rank without temporal steps returns an empty tensor with a gradient.
        """

    def forward(self, output: Tensor, inputs: VisionInputs) -> Tensor:
        """Return embeddings [tokens, `Architecture.vision_width`] of all temporal steps.

        `output` is what `encode` returns. Every tensor and context rank must call it. Every rank
        gets all tokens.
        """
        tokens = self.merge(output, inputs)
        sharing = self.mesh.vision
        if sharing.size == 1:
            return tokens
        return _GatherRows.apply(tokens, inputs.counts, sharing.group, self.mesh.context.group)

    def encode_local(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the embeddings that `forward` returns, computed by this rank without
        communication."""
        inputs = self._inputs(grids, self.arch, patches.device, None)
        return self.merge(self.encode(patches, inputs), inputs)

    def dummy_token(self) -> Tensor:
        """Return the embedding of one black square of merge x merge patches.

        A batch without visuals adds 0 x this embedding, so that every parameter of the tower gets a
        gradient. Megatron's overlapped gradient reduction waits for all of them.
        """
        side, weight = self.arch.merge, self.patch_embed.weight
        if self._dummy is None:
            self._dummy = self._inputs([(1, side, side)], self.arch, weight.device, None)
        black = weight.new_zeros(side**2, self.arch.patch_values)
        return self.merge(self.encode(black, self._dummy), self._dummy)

    def parameter_versions(self) -> tuple[tuple[int, int], ...]:
        """Return a fingerprint of the parameters: it changes when one is written in place or
        replaced."""
        return tuple((param.data_ptr(), param._version) for param in self.parameters())

    def layers(self) -> list[TransformerLayer]:
        """Return the tower's transformer layers in order."""
        return [module for module in self.modules() if isinstance(module, TransformerLayer)]

    def before_merger(self) -> list[Tensor]:
        """Return the parameters that the result of `encode` depends on."""
        return [p for name, p in self.named_parameters() if not name.startswith(MERGER)]

    def mark_copies(self) -> None:
        """Note on every parameter that each tensor rank holds a full copy."""
        for param in self.parameters():
            param.tensor_model_parallel = False
            param.sequence_parallel = False


def without_groups(mesh: Mesh) -> ProcessGroupCollection:
    """Return Megatron's process groups of a module that a rank computes alone."""
    alone = mesh.alone
    return ProcessGroupCollection(tp=alone, pp=alone, cp=alone, dp=alone, tp_cp=alone)


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
