"""Checksums that say whether the engine computes with the trainer's weights, bit for bit.

Both sides are brought to the same form: tensors under their published names, in the engine's
dtype, one SHA-256 each. The trainer's side is a pass over the exported tensors. The engine's side
reads the live model. vLLM fuses q, k, v and gate, up: they are split again. On a CPU it also packs
linear weights into an opaque kernel object and drops the plain ones: those are read back through
the very kernel that generates, by multiplying with the identity, which is exact (one product per
output is not zero). Only the sign of a zero is lost on that way, so both sides count -0 as 0.
Ranks that share a model gather each tensor. Left out: engines in FP8; more ranks than KV heads.
"""

import hashlib
from collections.abc import Iterator

import torch

from megatron_vrl.rollout.buckets import NamedTensors

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
HF_PREFIX = {  # how vLLM and transformers name in memory -> how checkpoints are published
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.visual.": "visual.",
}
IDENTITY_ROWS = 512


def tensor_checksums(named_tensors: NamedTensors, dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 of each tensor after a cast to `dtype`, by published name. Order does not matter."""
    return {_published(name): _digest(tensor.detach(), dtype) for name, tensor in named_tensors}


@torch.no_grad()
def live_checksums(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """The same of a live vLLM model. Every rank that shares the model calls it."""
    return tensor_checksums(_live_tensors(model, dtype), dtype)


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
    """What vLLM fused into this parameter, each gathered over the ranks that share it."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        plain, packed = parameter, _unpacked(module, module.embedding_dim, dtype)
        # A tied embedding lives twice: plain for the lookup, packed for the logits. A stale packed
        # copy must show, so it is the one reported when the two differ.
        local = plain if torch.equal(plain, packed) else packed
        return [_gathered(module, local, 0)[: module.org_vocab_size]]  # rows beyond are padding
    if not isinstance(module, linear.LinearBase):
        return [parameter]
    sizes = vars(module)
    if isinstance(module, linear.RowParallelLinear):
        if kind == "bias":
            return [parameter]  # the same on every rank
        weight = _unpacked(module, module.input_size_per_partition, dtype)
        return [_gathered(module, weight, 1)]
    local = _unpacked(module, module.input_size, dtype) if kind == "weight" else parameter
    widths = sizes.get("output_partition_sizes", [len(local)])
    return [_gathered(module, part, 0) for part in local.split(widths)]


def _gathered(module: torch.nn.Module, local: torch.Tensor, axis: int) -> torch.Tensor:
    from vllm.distributed import tensor_model_parallel_all_gather

    if vars(module)["tp_size"] == 1:
        return local
    whole: torch.Tensor = tensor_model_parallel_all_gather(local.contiguous(), axis)
    return whole


def _unpacked(module: torch.nn.Module, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] that the module's kernel multiplies with."""
    weight = module.get_parameter("weight")
    kernel = vars(module).get("cpu_linear")  # set by vLLM where it packs weights, on CPUs only
    if kernel is None:
        return weight
    identity = torch.eye(in_features, dtype=dtype).split(IDENTITY_ROWS)
    return torch.cat([kernel(rows, weight, None) for rows in identity]).T


def _published(name: str) -> str:
    for prefix, published in HF_PREFIX.items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def _digest(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    plain = (tensor.to(device="cpu", dtype=dtype) + 0.0).contiguous()
    return hashlib.sha256(plain.view(-1).view(torch.uint8).numpy().data).hexdigest()
