"""How a model is cut over a layout: whether it can be, and which layers each stage computes.

The stack of layers is cut into `pipeline x virtual` chunks in model order; chunk c belongs to
stage c mod pipeline (Megatron's interleaved order; one chunk per stage without `virtual`). The
first chunk also holds the vision tower and the token embedding, the last the final norm and the
head, so an even cut is the slowest stage's loss: `balanced` gives those chunks fewer layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import Architecture

# What `balanced` takes a token of a packed video prompt to be: 3 in 4 are vision cells, and 1 in 4
# is an answer's, which the head reads. A rollout group of 8 answers of 128 tokens to 3000.
VISION_SHARE = 0.75
ANSWER_SHARE = 0.25
FP8_TILE = 16  # channels; Transformer Engine takes no other number of them in FP8


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive layers that one stage computes without a message in between."""

    layers: range  # of the whole model, from 0
    embeds: bool  # holds the vision tower and the token embedding
    ends: bool  # holds the final norm and the head


def check_divides(arch: Architecture, model: Model, cfg: Parallel) -> None:
    """Raises ConfigError naming the first size that the layout does not divide."""
    for name, size in {"attention heads": arch.heads, "KV heads": arch.kv_heads}.items():
        if size % cfg.tensor:
            raise ConfigError(
                f"parallel.tensor={cfg.tensor} does not divide the model's {size} {name}: "
                f"choose one of {_divisors(arch.kv_heads)}."
            )
    layer_counts(arch, model, cfg)
    check_fp8(model, cfg)
    if model.fp8 != "none" and arch.mlp % (FP8_TILE * cfg.tensor):
        raise ConfigError(
            f"model.fp8={model.fp8} takes matrices in tiles of {FP8_TILE}, which "
            f"parallel.tensor={cfg.tensor} does not leave of the MLP's {arch.mlp} channels: lower "
            "parallel.tensor, or set model.fp8=none."
        )


def check_fp8(cfg: Model, parallel: Parallel) -> None:
    """Raises ConfigError if FP8 is asked of layers that do not have it."""
    if cfg.fp8 != "none" and cfg.layers == "megatron":
        raise ConfigError(
            f"model.fp8={cfg.fp8} is computed by Transformer Engine only: set "
            "model.layers=transformer_engine (rounded for a proof), or model.fp8=none."
        )
    if cfg.layers == "fp8_emulated" and (cfg.fp8 == "none" or parallel.tensor > 1):
        raise ConfigError(
            f"model.layers=fp8_emulated with model.fp8={cfg.fp8} and "
            f"parallel.tensor={parallel.tensor}: it rounds to FP8 on one tensor rank; "
            "set model.fp8 and parallel.tensor=1."
        )


def whole(arch: Architecture) -> Chunk:
    return Chunk(range(arch.layers), embeds=True, ends=True)


def stage_chunks(arch: Architecture, model: Model, cfg: Parallel, stage: int) -> list[Chunk]:
    """The chunks of one pipeline stage, in the order of its virtual stages."""
    return all_chunks(arch, model, cfg)[stage :: cfg.pipeline]


def all_chunks(arch: Architecture, model: Model, cfg: Parallel) -> list[Chunk]:
    """Every chunk in model order. Raises ConfigError if the layers cannot be cut so."""
    counts = layer_counts(arch, model, cfg)
    bounds = [0, *accumulate(counts)]
    return [
        Chunk(range(first, last), embeds=first == 0 and i == 0, ends=i == len(counts) - 1)
        for i, (first, last) in enumerate(pairwise(bounds))
    ]


def layer_counts(arch: Architecture, model: Model, cfg: Parallel) -> list[int]:
    """Layers of each chunk by `parallel.split`, or as `parallel.layers_per_chunk` says."""
    num_chunks = cfg.pipeline * cfg.virtual
    if cfg.layers_per_chunk:
        given = list(cfg.layers_per_chunk)
        if len(given) != num_chunks or sum(given) != arch.layers:
            raise ConfigError(
                f"parallel.layers_per_chunk={given} must hold pipeline x virtual = {num_chunks} "
                f"counts that add up to the model's {arch.layers} layers."
            )
        return given
    if num_chunks > arch.layers:
        raise ConfigError(
            f"parallel.pipeline={cfg.pipeline} x parallel.virtual={cfg.virtual} asks for more "
            f"chunks than the model's {arch.layers} layers: lower one of them."
        )
    if cfg.split == "balanced":
        return balanced_counts(arch.layers, extra_layers(arch, model), num_chunks)
    if arch.layers % num_chunks:
        raise ConfigError(
            f"parallel.pipeline={cfg.pipeline} x parallel.virtual={cfg.virtual} does not divide "
            f"the model's {arch.layers} layers: choose a product out of {_divisors(arch.layers)}, "
            "set parallel.split=balanced, or give parallel.layers_per_chunk."
        )
    return [arch.layers // num_chunks] * num_chunks


def extra_layers(arch: Architecture, model: Model) -> tuple[float, float]:
    """Work of the vision tower and of the head, in language layers.

    Counted in multiplications by weights, per packed token; a frozen tower has no backward pass
    (a third of the work) and the token embedding is a look-up.
    """
    v = arch.vision
    kv = arch.kv_heads * arch.head_dim
    layer = 2 * arch.hidden**2 + 2 * arch.hidden * kv + 3 * arch.hidden * arch.mlp
    block = 4 * v.hidden**2 + 3 * v.hidden * v.mlp
    merged = v.hidden * v.merge**2
    tower = v.merge**2 * (v.layers * block + v.patch_values * v.hidden)
    tower += merged * (merged + arch.hidden)
    passes = 1 / 3 if model.freeze_vision and model.freeze_merger else 1.0
    head = arch.hidden * arch.vocab
    return VISION_SHARE * passes * tower / layer, ANSWER_SHARE * head / layer


def balanced_counts(layers: int, extra: Sequence[float], num_chunks: int) -> list[int]:
    """Counts whose heaviest chunk is as light as can be, the first and last chunk weighing
    `extra` more; every chunk keeps a layer. Greedy and exact: layers are alike."""
    counts, weights = [1] * num_chunks, [1.0] * num_chunks
    weights[0] += extra[0]
    weights[-1] += extra[1]
    for _ in range(layers - num_chunks):
        lightest = min(range(num_chunks), key=lambda i: weights[i])
        counts[lightest] += 1
        weights[lightest] += 1.0
    return counts


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
