"""Bytes that a micro-batch saves for its backward pass, counted per tensor.

The method is that of "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198), applied to this project's layers: packed rows without a batch axis, RMSNorm that saves
its input, rotation in place, attention without stored scores whose queries, keys and values are
copied by `index_select` (cascade attention copies none), a gated MLP that saves gate, up and
product, no dropout. `tests/planner` compares every term with what torch saves.

Shape letters: L packed rows of this rank, S rows of norms (L / tensor under sequence parallelism),
C channels, A channels of all query heads of this rank, G channels of its key heads, F channels of
its MLP.
"""

from dataclasses import dataclass

from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.logprob_head import CHUNK_BYTES, GPU_CHUNK_BYTES
from megatron_vrl.models.recompute import layers_in_full, vision_level

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Properties of torch's kernels that change the memory."""

    on_gpu: bool = True
    scores: bool = False  # whether masked attention stores all scores in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Sizes of one layer's attention calls."""

    queries: int  # rows, including padding of buckets; with `cascade` those read by an index
    keys: int  # rows; a prompt's keys count once per answer
    mask: int  # entries of masks
    cascade: bool = False  # no copies but `keys` gathered rows of context-parallel ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Sizes of one layer on one rank, and the bytes it saves."""

    rows: int  # L
    norm_rows: int  # S
    channels: int  # C
    queries: int  # A
    keys: int  # G
    heads: int
    mlp: int  # F
    number: int  # bytes of a value
    stored: int  # bytes of a value of a linear layer's saved input: 1 in FP8
    attention: Attention
    kernels: Kernels
    gated: bool = True  # whether the MLP has a gate
    centred: bool = False  # whether the norms are LayerNorms, which save a mean as well
    head_norms: bool = False  # whether each query and key head has a norm
    learns: bool = True  # whether its weights are trained; with adapters they are not

    def without_recompute(self) -> int:
        """Return the bytes saved without recompute."""
        rest = self.stored * self.norm_rows * self.channels * 2 + self.norm_bytes() * 2
        rest += self.head_norm_bytes() + self.projection_bytes() + self.mlp_bytes()
        return rest + self.attention_bytes()

    def with_selective_recompute(self) -> int:
        """Return the bytes saved when attention is recomputed: the fused QKV output, rotated."""
        kept = self.number * self.rows * (self.queries + 2 * self.keys)
        return self.without_recompute() - self.attention_bytes() + kept

    def layer_input(self) -> int:
        """Return the bytes saved when the whole layer is recomputed: its input."""
        return self.number * self.norm_rows * self.channels

    def saved(self, recompute: str) -> int:
        """Return the bytes that one layer saves for the backward pass at a level of recompute."""
        return {
            "none": self.without_recompute,
            "selective": self.with_selective_recompute,
            "full": self.layer_input,
        }[recompute]()

    def recomputed(self, recompute: str) -> int:
        """Return the additional bytes that one layer at a time holds while it is recomputed."""
        return {"none": 0, "selective": self.attention_bytes(), "full": self.without_recompute()}[
            recompute
        ]

    def norm_bytes(self) -> int:
        """Return the bytes that a norm saves: its input, and one or two numbers a row."""
        return self.norm_rows * (self.number * self.channels + (1 + self.centred) * FLOAT32)

    def head_norm_bytes(self) -> int:
        """Return the bytes that the norms of query and key heads save.

        They are the fused QKV output before the norms, and one number for each head of a row.
        """
        if not self.head_norms:
            return 0
        heads = self.heads + self.heads * self.keys // self.queries
        return self.rows * (self.number * (self.queries + 2 * self.keys) + FLOAT32 * heads)

    def attention_bytes(self) -> int:
        """Return the bytes that core attention saves."""
        a = self.attention
        if a.cascade:  # the fused QKV output; the output is also the projection's input
            rounded = self.rows * self.queries * (self.stored != self.number)
            kept = self.rows * (self.queries + 2 * self.keys) + 2 * a.keys * self.keys + rounded
            return self.number * kept + FLOAT32 * self.heads * self.rows
        copies = self.number * (2 * a.queries * self.queries + 2 * a.keys * self.keys)
        scores = FLOAT32 * self.heads * a.mask if self.kernels.scores else 0
        sums = FLOAT32 * self.heads * a.queries
        return copies + sums + scores

    def projection_bytes(self) -> int:
        """Return the bytes that the output projection saves."""
        return self.stored * self.rows * self.queries

    def mlp_bytes(self) -> int:
        """Return the bytes that the MLP saves.

        They are gate and up, or the activation's input without a gate, and what the second matrix
        reads.
        """
        return self.rows * self.mlp * ((1 + self.gated) * self.number + self.stored)

    def temporary(self) -> int:
        """Return the largest temporary memory of the layer's backward pass.

        It is beside the gradient of the layer's output, in the MLP: while SwiGLU makes the
        gradients of gate and up from that of the product, or while a linear layer makes the
        gradient of its weight. A GPU's SwiGLU is one kernel, and the product is freed by then; a
        CPU's has a SiLU, which takes the place of the product.
        """
        values, first = self.rows * self.mlp, self.learns * self.mlp * self.channels
        if not self.kernels.on_gpu:
            of_output = 2 * self.number * self.norm_rows * self.channels
            return of_output + self.number * (values + max(first, 2 * values))
        product = self.stored * values  # saved by the layer, freed when SwiGLU's gradient is made
        swiglu = 3 * self.number * values - product
        second = self.number * (values + first) + self.gather_buffer()  # of the output's gradient
        at_first = self.number * (2 * first + self.rows * self.channels - values) - product
        of_output = self.number * self.norm_rows * self.channels
        return of_output + max(swiglu, second, at_first)

    def gather_buffer(self) -> int:
        """Return the bytes of the buffer that sequence parallelism gathers rows into; else 0.

        Megatron makes it in the first pass and keeps it (`GlobalMemoryBuffer`). A frozen layer
        gathers without it.
        """
        gathers = self.norm_rows < self.rows and self.learns
        return self.number * self.rows * self.channels * gathers


def dtype_bytes(model: Model) -> int:
    """Return the bytes of a value of `model.dtype`."""
    return 2 if model.dtype == "bfloat16" else 4


def language_layer(
    arch: Architecture,
    model: Model,
    cfg: Parallel,
    rows: int,
    attention: Attention,
    kernels: Kernels,
) -> Layer:
    """Return the sizes of a language layer on a rank with `rows` packed rows."""
    number = dtype_bytes(model)
    return Layer(
        rows=rows,
        norm_rows=rows // cfg.tensor if cfg.sequence else rows,
        channels=arch.hidden,
        queries=arch.heads * arch.head_dim // cfg.tensor,
        keys=arch.kv_heads * arch.head_dim // cfg.tensor,
        heads=arch.heads // cfg.tensor,
        mlp=arch.mlp // cfg.tensor,
        number=number,
        stored=number if model.fp8 == "none" else 1,
        attention=attention,
        kernels=kernels,
        head_norms=arch.qk_norm,
        learns=model.trains_language,
    )


def layers_saved(layer: Layer, model: Model, layers: int) -> int:
    """Return the bytes that a chunk of `layers` language layers saves."""
    in_full = layers_in_full(model, layers)
    return in_full * layer.saved("full") + (layers - in_full) * layer.saved(_rest(model))


def layers_recomputed(layer: Layer, model: Model, layers: int) -> int:
    """Return the additional bytes while a layer of a chunk of `layers` layers is recomputed.

    They are counted from all that the chunk saved. Layers after the recomputed ones have freed
    theirs by then.
    """
    in_full = layers_in_full(model, layers)
    if not in_full:
        return layer.recomputed(model.recompute)
    return max(0, layer.recomputed("full") - (layers - in_full) * layer.saved("none"))


def _rest(model: Model) -> str:
    """Return the level of the layers that are not recomputed in full."""
    return "none" if model.recompute == "full" else model.recompute


def tower_block(arch: Architecture, model: Model, patches: int, kernels: Kernels) -> Layer:
    """Return the sizes of a tower block with RMSNorm and a gated MLP, on a rank with `patches`
    patches."""
    v = arch.vision
    number = dtype_bytes(model)
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


def vision_layer(arch: Architecture, model: Model, patches: int, kernels: Kernels) -> Layer:
    """Return the sizes of a block of the vision tower on a rank with `patches` patches."""
    return family_of(arch).tower.block(arch, model, patches, kernels)


def vision_saved(
    arch: Architecture, model: Model, block: Layer, all_patches: int, tokens: int
) -> int:
    """Return the bytes saved by the vision tower, the merger and the inserted vision embeddings.

    `all_patches` are the patches of the micro-batch, `tokens` the vision tokens among this rank's
    rows.
    """
    if not all_patches:
        return 0
    kept = merger_saved(arch, model, block, tokens)
    if not model.freeze_vision:
        kept += arch.vision.layers * block.saved(vision_level(model))
        # A rank's patches are a view, which keeps all patches alive.
        kept += block.number * all_patches * arch.vision.patch_values
        kept += plan_bytes(block)
    return kept


def merger_saved(arch: Architecture, model: Model, block: Layer, tokens: int) -> int:
    """Return the part of `vision_saved` that is freed before the backward pass of the blocks."""
    if model.freeze_vision and model.freeze_merger:
        return 0
    kept = family_of(arch).tower.merger_saved(arch, block)
    return kept + block.number * tokens * arch.vision_width


def head_saved(arch: Architecture, model: Model, layer: Layer, targets: int) -> int:
    """Return the bytes saved by the final norm, and by the rows that predict `targets` tokens."""
    return layer.norm_bytes() + dtype_bytes(model) * targets * arch.hidden


def head_temporary(
    arch: Architecture, model: Model, vocab_shard: int, targets: int, kernels: Kernels
) -> int:
    """Return the temporary bytes of the head, with `vocab_shard` rows of it on this rank.

    They are the head's gradient in float32, unless it is frozen, the gradient of the rows, and the
    buffers of logits
    (one on a GPU, two elsewhere), of which 16 bits need a copy. When the buffers are free again,
    16 bits need a copy of the head's gradient.
    """
    number = dtype_bytes(model)
    chunk = GPU_CHUNK_BYTES if kernels.on_gpu else CHUNK_BYTES
    logits = vocab_shard * min(targets, max(1, chunk // (FLOAT32 * vocab_shard)))
    weight = model.trains_language * vocab_shard * arch.hidden
    buffers = 1 if kernels.on_gpu else 2
    copy = number if number < FLOAT32 else 0
    largest = max((FLOAT32 * buffers + copy) * logits, copy * weight)
    return FLOAT32 * weight + largest + number * targets * arch.hidden


def plan_bytes(layer: Layer) -> int:
    """Return the bytes of rotary tables and additive masks that all layers of a micro-batch
    share."""
    tables = 2 * layer.number * layer.rows * (layer.queries // layer.heads)
    return tables + layer.number * layer.attention.mask


def input_bytes(layer: Layer, block: Layer, targets: int, vision_tokens: int) -> int:
    """Return the bytes of a micro-batch's inputs but for patches, which a pass finds on the GPU.

    They are token ids, positions, attention plans of the model and of the tower, the tower's
    rotary angles, and what head and loss read of each target. Every stage holds all of them, for
    all micro-batches of an update.
    """
    a = layer.attention
    each = 4 if a.cascade else 5  # of a row: token id, three positions, index among the outputs
    rows = INT64 * (a.queries + a.keys + each * layer.rows) + a.mask
    angles = FLOAT32 * (block.queries // block.heads)
    vision = block.rows * (angles + 6 * INT64) + 2 * INT64 * vision_tokens
    return rows + vision + targets * (3 * INT64 + 3 * FLOAT32)
