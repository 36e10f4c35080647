"""SHA-256 of the weights that a live vLLM model computes with.

vLLM fuses q, k, v and gate, up; the fused tensors are split again. On a CPU with
`rollout.cpu_prepack_weights` vLLM packs linear weights into an opaque kernel object and drops the
plain tensors. They are read back through that kernel, by multiplying it with the identity matrix.
The product is exact except for the sign of zeros, since each output has one nonzero term.
Ranks that share a model gather each tensor.

Not supported: FP8 engines; more tensor-parallel ranks than KV heads.
"""

from collections.abc import Iterator

import torch

from megatron_vrl.models.families import family_named
from megatron_vrl.models.family import released_name
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.interfaces import Checksums
from megatron_vrl.rollout.vllm.compat import cpu_kernel, output_widths, tensor_parallel_size

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
IDENTITY_ROWS = 512


@torch.no_grad()
def live_checksums(model: torch.nn.Module, dtype: torch.dtype, family: str) -> Checksums:
    """Return SHA-256 by HF name of every weight. Every rank that shares the model calls it.

    `family` is a row of `FAMILIES`.
    """
    weights = family_named(family).weights
    tensors = _live_tensors(model, dtype)
    return tensor_checksums(((released_name(weights, n), t) for n, t in tensors), dtype)


def _live_tensors(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        prefix, _, kind = name.rpartition(".")
        parts = _whole_parts(modules[prefix], parameter, kind, dtype)
        parent, _, leaf = prefix.rpartition(".")
        if leaf not in FUSED:
            yield name, torch.cat(parts) if len(parts) > 1 else parts[0]
            continue
        for part_name, part in zip(FUSED[leaf], parts, strict=True):
            yield f"{parent}.{part_name}.{kind}", part


def _whole_parts(
    module: torch.nn.Module, parameter: torch.Tensor, kind: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return the tensors fused into this parameter, each gathered over the sharing ranks.

    kind: "weight" or "bias".
    """
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        plain, packed = parameter, _unpacked(module, module.embedding_dim, dtype)
        # A tied embedding exists twice: plain for the lookup, packed for the logits. The packed
        # copy is reported when the two differ, so that a stale one is noticed.
        local = plain if torch.equal(plain, packed) else packed
        return [_gathered(module, local, 0)[: module.org_vocab_size]]  # rows beyond are padding
    if not isinstance(module, linear.LinearBase):
        return [parameter]
    if isinstance(module, linear.RowParallelLinear):
        if kind == "bias":
            return [parameter]  # replicated on every rank
        weight = _unpacked(module, module.input_size_per_partition, dtype)
        return [_gathered(module, weight, 1)]
    local = _unpacked(module, module.input_size, dtype) if kind == "weight" else parameter
    return [_gathered(module, part, 0) for part in local.split(output_widths(module, len(local)))]


def _gathered(module: torch.nn.Module, local: torch.Tensor, axis: int) -> torch.Tensor:
    from vllm.distributed import tensor_model_parallel_all_gather

    if tensor_parallel_size(module) == 1:
        return local
    whole: torch.Tensor = tensor_model_parallel_all_gather(local.contiguous(), axis)
    return whole


def _unpacked(module: torch.nn.Module, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [out, in] that the module's kernel multiplies with."""
    weight = module.get_parameter("weight")
    kernel = cpu_kernel(module)
    if kernel is None:
        return weight
    identity = torch.eye(in_features, dtype=dtype).split(IDENTITY_ROWS)
    return torch.cat([kernel(rows, weight, None) for rows in identity]).T
