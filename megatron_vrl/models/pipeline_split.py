"""Split of a model over pipeline stages, and the checks that a layout can hold the model.

The stack of layers is cut into `pipeline x virtual` chunks in model order. Chunk c belongs to stage
c mod pipeline (Megatron's interleaved order; without `virtual` one chunk per stage). The first
chunk also holds the vision tower and the token embedding, the last chunk the final norm and the
head. An even split makes those chunks the slowest; `parallel.split: balanced` gives them fewer
layers.

Example: 28 layers, pipeline 2, virtual 2, even: chunks of 7 layers; stage 0 has chunks 0 and 2.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.adapters import check_lora
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.families import family_of
from megatron_vrl.models.matrices import head_weights, language_layer_weights
from megatron_vrl.models.recompute import check_recompute
from megatron_vrl.parallel.mesh import FP8_BLOCK

# Assumption of `balanced` about packed tokens: 3 in 4 are vision tokens, 1 in 4 is an answer's
# token, which the head reads. Example: 8 answers of 128 tokens beside a prompt of 3000 tokens.
VISION_FRACTION = 0.75
ANSWER_FRACTION = 0.25
FP8_TILE = 16  # Transformer Engine's FP8 needs channels in multiples of 16


def check_divides(arch: Architecture, model: Model, cfg: Parallel) -> None:
    """Raise ConfigError naming the first size that the layout does not divide."""
    for name, size in {"attention heads": arch.heads, "KV heads": arch.kv_heads}.items():
        if size % cfg.tensor:
            raise ConfigError(
                f"parallel.tensor={cfg.tensor} does not divide the model's {size} {name}: "
                f"choose one of {_divisors(arch.kv_heads)}."
            )
    _check_deepstack(arch, layer_counts(arch, model, cfg)[0])
    check_recompute(model)
    check_lora(model)
    check_fp8(model, cfg)
    if model.fp8 != "none" and arch.mlp % (FP8_TILE * cfg.tensor):
        raise ConfigError(
            f"model.fp8={model.fp8} needs matrices in tiles of {FP8_TILE}; "
            f"parallel.tensor={cfg.tensor} does not split the MLP's {arch.mlp} channels so: lower "
            "parallel.tensor, or set model.fp8=none."
        )
    if model.fp8 == "blockwise" and cfg.sequence and arch.hidden % FP8_BLOCK:
        raise ConfigError(
            f"model.fp8=blockwise with parallel.sequence=true gathers blocks of {FP8_BLOCK} "
            f"values, which do not divide the model's {arch.hidden} hidden channels: set "
            "parallel.sequence=false or model.fp8=current."
        )


def _check_deepstack(arch: Architecture, first_chunk: int) -> None:
    """Raise ConfigError if the first chunk has fewer layers than there are DeepStack features."""
    features = len(arch.vision.deepstack_layers)
    if first_chunk < features:
        raise ConfigError(
            f"The first pipeline stage gets {first_chunk} of the model's {arch.layers} layers, but "
            f"vision features are added after each of the first {features} (DeepStack), which must "
            "be on that stage: lower parallel.pipeline x parallel.virtual, or give "
            "parallel.layers_per_chunk."
        )


def check_fp8(cfg: Model, parallel: Parallel) -> None:
    """Raise ConfigError if `model.fp8` is set for layers that cannot compute it."""
    if cfg.fp8 != "none" and cfg.layers == "megatron":
        raise ConfigError(
            f"model.fp8={cfg.fp8} is computed by Transformer Engine only: set "
            "model.layers=transformer_engine (or fp8_emulated), or model.fp8=none."
        )
    if cfg.layers == "fp8_emulated" and (cfg.fp8 == "none" or parallel.tensor > 1):
        raise ConfigError(
            f"model.layers=fp8_emulated with model.fp8={cfg.fp8} and "
            f"parallel.tensor={parallel.tensor}: emulation needs FP8 and one tensor rank; "
            "set model.fp8 and parallel.tensor=1."
        )


def stage_chunks(arch: Architecture, model: Model, cfg: Parallel, stage: int) -> list[Chunk]:
    """Return the chunks of one pipeline stage, in the order of its virtual stages."""
    return all_chunks(arch, model, cfg)[stage :: cfg.pipeline]


def all_chunks(arch: Architecture, model: Model, cfg: Parallel) -> list[Chunk]:
    """Return all chunks in model order. Raise ConfigError if the layers cannot be split so."""
    counts = layer_counts(arch, model, cfg)
    bounds = [0, *accumulate(counts)]
    return [
        Chunk(
            range(first, last), pre_process=first == 0 and i == 0, post_process=i == len(counts) - 1
        )
        for i, (first, last) in enumerate(pairwise(bounds))
    ]


def layer_counts(arch: Architecture, model: Model, cfg: Parallel) -> list[int]:
    """Return the number of layers of each chunk, by `parallel.layers_per_chunk` or
    `parallel.split`.

    Raise ConfigError if the layers cannot be split so.
    """
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
    """Return the work of the vision tower and of the head, measured in language layers.

    The unit is multiply-adds with weights per packed token. A frozen tower has no backward pass, so
    it counts a third. The token embedding is a look-up and counts nothing.
    """
    layer = language_layer_weights(arch)
    sizes = family_of(arch).tower
    tower = arch.vision.merge**2 * sizes.tower_weights(arch.vision) + sizes.merger_weights(arch)
    passes = 1 / 3 if model.freeze_vision and model.freeze_merger else 1.0
    return (
        VISION_FRACTION * passes * tower / layer,
        ANSWER_FRACTION * head_weights(arch) / layer,
    )


def balanced_counts(layers: int, extra: Sequence[float], num_chunks: int) -> list[int]:
    """Return layer counts that minimise the heaviest chunk; every chunk gets at least one layer.

    The first and last chunk weigh `extra[0]` and `extra[1]` layers more. The greedy rule is exact
    because all layers weigh the same.
    """
    counts, weights = [1] * num_chunks, [1.0] * num_chunks
    weights[0] += extra[0]
    weights[-1] += extra[1]
    for _ in range(layers - num_chunks):
        lightest = min(range(num_chunks), key=lambda i: weights[i])
        counts[lightest] += 1
        weights[lightest] += 1.0
    return counts


def _divisors(number: int) -> list[int]:
    """Return all divisors of `number`, ascending."""
    return [k for k in range(1, number + 1) if number % k == 0]
