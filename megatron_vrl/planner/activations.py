"""Bytes that a micro-batch keeps for its backward pass, tensor by tensor as our layers save them.

The method is that of "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198), the tensors are ours: a packed row sequence without batch axis, RMSNorm, rotary angles
made per call, attention through a kernel without scores whose queries, keys and values are copies
by `index_select`, a gated MLP whose SiLU is kept, and no dropout. On a CPU torch's RMSNorm is made
of pieces that keep two float32 copies; on a GPU it is one kernel that keeps its input.
`tests/planner` holds every term to what torch saves.

Shape letters: L packed rows of this rank, S of them where norms are (L / tensor under sequence
parallelism), C channels, A channels of all query heads of this rank, G of its key heads, F of its
MLP.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_vrl.batching.pack import Answer, Group, pack, share_context
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.logprob_head import CHUNK_BYTES
from megatron_vrl.models.segments import exact_sizes, padded_sizes
from megatron_vrl.planner.workload import Packed
from megatron_vrl.types import Prompt

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Which of torch's kernels compute."""

    on_gpu: bool = True
    scores: bool = False  # attention with a mask by the kernel that holds all scores in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What the calls of one layer read."""

    queries: int  # rows, with those that pad a bucket
    keys: int  # rows; a prompt's once for each answer
    mask: int  # entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Sizes of one layer on one rank."""

    rows: int  # L
    norm_rows: int  # S
    channels: int  # C
    queries: int  # A
    keys: int  # G
    heads: int
    mlp: int  # F
    number: int  # bytes
    stored: int  # bytes of a number of a linear's input: 1 in FP8
    attention: Attention
    kernels: Kernels

    def whole(self) -> int:
        """Without recompute."""
        rest = self.stored * self.norm_rows * self.channels * 2 + self.norm() * 2
        return rest + self.attends() + self.projects() + self.computes_mlp()

    def selective(self) -> int:
        """Attention computed again: rotated queries and keys, and all that `v` is a view of."""
        kept = self.number * self.rows * (2 * self.queries + 3 * self.keys)
        return self.whole() - self.attends() + self.rotary() + kept

    def full(self) -> int:
        return self.number * self.norm_rows * self.channels

    def kept(self, recompute: str) -> int:
        """For the backward pass."""
        return {"none": self.whole, "selective": self.selective, "full": self.full}[recompute]()

    def again(self, recompute: str) -> int:
        """What one layer at a time holds besides, while it is computed again."""
        return {"none": 0, "selective": self.attends(), "full": self.whole()}[recompute]

    def norm(self) -> int:
        each = self.number if self.kernels.on_gpu else 2 * FLOAT32
        return self.norm_rows * (each * self.channels + FLOAT32)

    def rotary(self) -> int:
        """Cosines and sines, for queries and for keys."""
        return 4 * self.number * self.rows * (self.queries // self.heads)

    def attends(self) -> int:
        a = self.attention
        copies = self.number * (2 * a.queries * self.queries + 2 * a.keys * self.keys)
        scores = FLOAT32 * self.heads * a.mask if self.kernels.scores else 0
        sums = FLOAT32 * self.heads * a.queries
        return self.rotary() + copies + sums + self.number * a.mask + scores

    def projects(self) -> int:
        return self.stored * self.rows * self.queries

    def computes_mlp(self) -> int:
        """Gate and up, SiLU of the gate, a copy of up (Megatron adds an offset of 0), and their
        product, which the second matrix reads."""
        return self.rows * self.mlp * (4 * self.number + self.stored)

    def working(self) -> int:
        """Gradients that a layer's backward pass holds besides what was kept: the most is in the
        MLP, of its product and of one factor, of the layer's output, and of the second matrix."""
        gathered = self.rows * self.channels if self.norm_rows < self.rows else 0
        rows = 2 * self.rows * self.mlp + 2 * self.norm_rows * self.channels + gathered
        return self.number * (rows + self.mlp * self.channels)


def number_bytes(model: Model) -> int:
    return 2 if model.dtype == "bfloat16" else 4


def language_layer(
    arch: Architecture, model: Model, cfg: Parallel, batch: Packed, kernels: Kernels
) -> Layer:
    rows = batch.rows // cfg.context
    number = number_bytes(model)
    return Layer(
        rows=rows,
        norm_rows=rows // cfg.tensor if cfg.sequence else rows,
        channels=arch.hidden,
        queries=arch.hidden // cfg.tensor,
        keys=arch.kv_heads * arch.head_dim // cfg.tensor,
        heads=arch.heads // cfg.tensor,
        mlp=arch.mlp // cfg.tensor,
        number=number,
        stored=number if model.fp8 == "none" else 1,
        attention=_attention(batch, cfg.context, _in_buckets(model)),
        kernels=kernels,
    )


@cache
def _in_buckets(model: Model) -> bool:
    """Attention under masks: what `auto` stands for on a GPU depends on the number format."""
    return model.attention == "sdpa" or (model.attention == "auto" and model.dtype == "float32")


def _attention(batch: Packed, context: int, masks: bool) -> Attention:
    """Of the context rank that reads the most, in a micro-batch made for this."""
    size = batch.of
    prompt = Prompt(
        id="",
        visuals=(),
        token_ids=np.zeros(size.prompt, np.int64),
        engine_token_ids=(),
        positions=np.zeros((3, size.prompt), np.int64),
    )
    answer = Answer(
        token_ids=np.zeros(size.response, np.int64),
        advantage=0.0,
        engine_logprobs=np.zeros(size.response, np.float32),
    )
    group = Group(prompt=prompt, answers=(answer,) * size.answers)
    whole = pack([group] * batch.groups, at_least=batch.rows)
    shares = [share_context(whole, rank, context) for rank in range(context)]
    if masks:
        sizes = [padded_sizes(share) for share in shares]
    else:
        sizes = [(*exact_sizes(share), 0) for share in shares]
    queries, keys, mask = max(sizes, key=lambda found: found[2] + found[0] + found[1])
    return Attention(queries=queries, keys=keys, mask=mask)


def recompute_of_tower(model: Model) -> str:
    """`selective` leaves it alone, and what is frozen goes back through nothing."""
    return "full" if model.recompute == "full" and not model.freeze_vision else "none"


def vision_layer(
    arch: Architecture, model: Model, cfg: Parallel, batch: Packed, kernels: Kernels
) -> Layer:
    """The tower's blocks: every rank has all channels and its share of the patches."""
    v = arch.vision
    patches = -(-batch.groups * batch.of.patches // (cfg.tensor * cfg.context))
    number = number_bytes(model)
    return Layer(
        rows=patches,
        norm_rows=patches,
        channels=v.hidden,
        queries=v.hidden,
        keys=v.hidden,
        heads=v.heads,
        mlp=v.mlp,
        number=number,
        stored=number,
        attention=Attention(queries=patches, keys=patches, mask=0),
        kernels=kernels,
    )


def vision_kept(
    arch: Architecture, model: Model, cfg: Parallel, batch: Packed, kernels: Kernels
) -> int:
    """The tower with its merger, and the tokens as they are put into their places."""
    if not batch.of.patches:
        return 0
    layer = vision_layer(arch, model, cfg, batch, kernels)
    kept = merger_kept(arch, model, cfg, batch, layer)
    if not model.freeze_vision:
        kept += arch.vision.layers * layer.kept(recompute_of_tower(model))
        # A rank reads a slice of them, and a slice holds all.
        kept += layer.number * batch.groups * batch.of.patches * arch.vision.patch_values
    return kept


def merger_kept(
    arch: Architecture, model: Model, cfg: Parallel, batch: Packed, block: Layer
) -> int:
    """Of that what is gone when the tower's blocks go back."""
    if model.freeze_vision and model.freeze_merger:
        return 0
    tokens = batch.groups * batch.of.vision_tokens // cfg.context
    patch_channels = block.number * block.rows * arch.vision.hidden
    kept = 3 * patch_channels  # norm's output; before and after the GELU
    kept += block.norm() * (not model.freeze_vision)
    return kept + block.number * tokens * arch.hidden


def head_kept(arch: Architecture, model: Model, batch: Packed, layer: Layer, context: int) -> int:
    """The final norm, and the rows that predict an answer's token."""
    targets = batch.groups * batch.of.targets // context
    return layer.norm() + number_bytes(model) * targets * arch.hidden


def head_working(words: int, arch: Architecture, model: Model, batch: Packed, context: int) -> int:
    """Two buffers of logits and their product in `dtype`; the head's gradient in float32, and in
    `dtype` as it is handed on; the gradient of the rows. `words`: of this rank."""
    number = number_bytes(model)
    targets = batch.groups * batch.of.targets // context
    rows = min(targets, max(1, CHUNK_BYTES // (FLOAT32 * words)))
    product = number if number < FLOAT32 else 0
    logits = rows * words * (2 * FLOAT32 + product)
    weight = words * arch.hidden * (FLOAT32 + product)
    return logits + weight + number * targets * arch.hidden


def plan_bytes(layer: Layer) -> int:
    """Row numbers and masks of a micro-batch's attention plan, which its layers share."""
    a = layer.attention
    return INT64 * (a.queries + a.keys + layer.rows) + a.mask
