"""Operations, bytes and host reads of one update and of its parts, counted by torch's dispatcher.

Nothing is timed: the counts are those of this machine's kernels, whatever its speed. Parts are one
language layer and one vision layer, each forward and backward alone (a frozen vision layer only
forward), the head, and a whole update with its optimizer. `ours` are the layers of a run,
`megatron` the local layer spec of megatron.core (GPTModel's default without Transformer Engine),
`transformers` the layer of `modeling_qwen2_5_vl.py`; each has the same sizes, rows and number
format. `ours, flash` has attention without copies of a prompt's keys, `ours, GPU` also the fused
kernels of a GPU, each counted by its call (benches/fused_forms.py). `saved_bytes` is what autograd
keeps for the backward pass, beside weights."""

import argparse
import collections
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benches.fused_forms import FusedForms
from benches.update import ROOT, draw_weights, group
from megatron_vrl.algorithms import token_loss
from megatron_vrl.config import Algorithm, Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.logprob_head import Distribution, token_logprobs
from megatron_vrl.observe.op_counter import OpCounter
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy

Row = dict[str, Any]
Call = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]  # a layer with its arguments


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument(
        "--recompute", default="none", help="none, selective or full; of the update"
    )
    parser.add_argument("--by-name", action="store_true", help="add the counts of each operation")
    for name, value in {"frames": 4, "height": 112, "width": 112}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="of the video")
    parser.add_argument("--answer-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--group", type=int, default=8, help="answers to the prompt")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    arch = architecture()
    mesh = init_mesh(Parallel(), seed=1)
    policy = make_policy(arch, mesh, arguments)
    batches = batches_of(arch, mesh, arguments)
    language, vision = layer_calls(policy, batches)
    flash, _ = layer_calls(make_policy(arch, mesh, arguments, attention="flash"), batches)
    hidden = partial(torch.randn, dtype=policy.chunks[0].config.params_dtype)
    rows = len(batches[0].rows)
    sides: dict[tuple[str, str], Callable[[], tuple[OpCounter, int]]] = {
        ("language layer", "ours"): lambda: count_layer(language),
        ("language layer", "ours, flash"): lambda: count_layer(flash),
        ("language layer", "ours, GPU"): lambda: count_fused(arch, mesh, arguments),
        ("language layer", "megatron"): lambda: count_layer(megatron_layer(policy, rows)),
        ("language layer", "transformers"): lambda: count_layer(hf_layer(arch, hidden, rows)),
        ("MLP of it", "ours"): lambda: count_layer(mlp_of(language)),
        ("language layer in an update", "ours"): lambda: difference(arch, mesh, arguments),
        ("frozen vision layer", "ours"): lambda: count_layer(vision, frozen=True),
        ("head", "ours"): lambda: count_head(arch, mesh, hidden),
        ("update", "ours"): lambda: count_update(policy, batches),
    }
    for (part, side), count in sides.items():
        counter, saved = count()
        yield {
            "bench": "ops",
            "part": part,
            "side": side,
            "operations": counter.total,
            "mb_moved": counter.bytes_moved / 1e6,
            "host_reads": sum(counter.host_reads.values()),
            "uploads": sum(counter.uploads.values()),
            "saved_bytes": saved,
        } | ({"by_name": dict(counter.operations.most_common())} if arguments.by_name else {})
    close_mesh()


def architecture() -> Architecture:
    """Return Qwen2.5-VL-3B with the layers and the ratios of a layer, and small sizes."""
    arch = read_architecture(ROOT / "configs/models/qwen2.5-vl-3b.json")
    vision = replace(
        arch.vision, hidden=160, heads=2, mlp=428, layers=2, full_attention_layers=(1,)
    )
    tokens: dict[str, Any] = {"video_token": 2001, "image_token": 2002, "vision_start_token": 2003}
    sizes: dict[str, Any] = {"hidden": 512, "heads": 4, "kv_heads": 2, "mlp": 2752, "layers": 2}
    sizes["vocab"] = 2048
    return replace(arch, **sizes, **tokens, vision=vision)


def make_policy(
    arch: Architecture, mesh: Mesh, arguments: argparse.Namespace, **model: Any
) -> Policy:
    """Return a policy of random weights with a frozen tower, ready to update."""
    cfg = Model(
        checkpoint="none",
        dtype=arguments.dtype,
        recompute=arguments.recompute,
        freeze_vision=True,
        freeze_merger=True,
        **model,
    )
    policy = Policy(arch, cfg, Parallel(), mesh)
    draw_weights(policy)
    policy.start_phase(Optimizer(lr=1e-6), num_steps=10**6)
    return policy


def batches_of(arch: Architecture, mesh: Mesh, arguments: argparse.Namespace) -> list[Any]:
    """Return the one micro-batch of a group."""
    whole = group(arch, arguments)
    return plan_batches([whole], whole, Batch(tokens=100_000), mesh)


def layer_calls(policy: Policy, batches: list[Any]) -> tuple[Call, Call]:
    """Return the second language layer and the first vision layer with the arguments of a pass."""
    chunk = policy.chunks[0]
    assert chunk.vision is not None
    layers = chunk.language.decoder.layers[1], chunk.vision.layers()[0]
    calls: dict[int, Call] = {}

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[id(module)] = (module, args, kwargs)

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    policy.logprobs(batches, Distribution())
    for hook in hooks:
        hook.remove()
    return calls[id(layers[0])], calls[id(layers[1])]


def mlp_of(call: Call) -> Call:
    """Return the MLP of a layer, with hidden states as its argument."""
    layer: Any = call[0]
    _, args, kwargs = call
    return layer.mlp, ((args or (kwargs["hidden_states"],))[0],), {}


def difference(
    arch: Architecture, mesh: Mesh, arguments: argparse.Namespace
) -> tuple[OpCounter, int]:
    """Return what one layer more adds to an update, its part of the optimizer included."""
    counts = []
    for layers in (2, 3):
        arch = replace(arch, layers=layers)
        policy, batches = make_policy(arch, mesh, arguments), batches_of(arch, mesh, arguments)
        counts.append(count_update(policy, batches))
    (few, less), (many, more) = counts
    for name in ("operations", "host_reads", "uploads"):
        getattr(many, name).subtract(getattr(few, name))
    many.bytes_moved -= few.bytes_moved
    return many, more - less


def megatron_layer(policy: Policy, rows: int) -> Call:
    """Return megatron.core's own layer on a causal sequence of `rows` rows, with its arguments."""
    config = replace(
        policy.chunks[0].config, recompute_granularity=None, use_te_activation_func=False
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    layer.to(config.params_dtype)
    mask = torch.ones(1, 1, rows, rows, dtype=torch.bool).triu(1)
    angles = torch.rand(rows, 1, 1, config.kv_channels)
    hidden = torch.randn(rows, 1, config.hidden_size, dtype=config.params_dtype)
    return layer, (hidden,), {"attention_mask": mask, "rotary_pos_emb": angles}


def hf_layer(arch: Architecture, hidden: Callable[..., Tensor], rows: int) -> Call:
    """Return transformers' layer with sdpa on a causal sequence of `rows` rows."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VLDecoderLayer,
        Qwen2_5_VLRotaryEmbedding,
    )

    make: Any = Qwen2_5_VLTextConfig
    config: Any = make(
        hidden_size=arch.hidden,
        intermediate_size=arch.mlp,
        num_hidden_layers=1,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": arch.rope_base,
            "mrope_section": list(arch.mrope_section),
        },
        attn_implementation="sdpa",
    )
    given = hidden(1, rows, arch.hidden)
    layer = Qwen2_5_VLDecoderLayer(config, 0).to(given.dtype)
    positions = torch.arange(rows).expand(3, 1, rows)
    tables = Qwen2_5_VLRotaryEmbedding(config)(given, positions)
    return layer, (given,), {"position_embeddings": tables, "attention_mask": None}


def count_fused(
    arch: Architecture, mesh: Mesh, arguments: argparse.Namespace
) -> tuple[OpCounter, int]:
    """Return what a language layer dispatches with the fused forms of a GPU, by their calls."""
    forms = FusedForms()
    with forms.in_place():
        policy = make_policy(arch, mesh, arguments, attention="flash")
        language, _ = layer_calls(policy, batches_of(arch, mesh, arguments))
        return count_layer(language, forms=forms)


def count_layer(
    call: Call, *, frozen: bool = False, forms: FusedForms | None = None
) -> tuple[OpCounter, int]:
    """Return what a layer's forward and backward pass dispatches, and the bytes saved between."""
    forms = forms or FusedForms()
    layer, args, kwargs = call
    kwargs = dict(kwargs)
    leaf = (args or (kwargs.pop("hidden_states"),))[0].detach()
    for _ in range(2):  # the first call makes what lives longer, such as Megatron's buffers
        given = leaf.clone().requires_grad_(not frozen)
        weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        saved = _Saved(weights | {given.untyped_storage().data_ptr()})
        with OpCounter() as forms.counter, saved.hooks():
            out = layer(given, *args[1:], **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            if not frozen:
                out.backward(out.detach())
    assert forms.counter is not None
    return forms.counter, saved.most


class _Saved:
    """Bytes of the storages that autograd keeps, each counted once."""

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._held: collections.Counter[int] = collections.Counter()
        self.now = self.most = 0

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> Any:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._known:
            self.now += size * (not self._held[key])
            self.most = max(self.most, self.now)
            self._held[key] += 1
            weakref.finalize(kept, self._let_go, key, size)
        return kept

    def _let_go(self, key: int, size: int) -> None:
        self._held[key] -= 1
        self.now -= size * (not self._held[key])


class _Kept:
    """Holder of a saved tensor that can be watched."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def count_head(
    arch: Architecture, mesh: Mesh, hidden: Callable[..., Tensor]
) -> tuple[OpCounter, int]:
    """Return what 1,280 targets in five chunks dispatch, forward and backward."""
    rows, chunk = 1280, 256
    states = hidden(rows, arch.hidden).requires_grad_()
    weight = hidden(arch.vocab, arch.hidden).requires_grad_()
    target = torch.randint(arch.vocab, (rows,))
    saved = _Saved({t.untyped_storage().data_ptr() for t in (states, weight, target)})
    with OpCounter() as counter, saved.hooks():
        logprob, entropy = token_logprobs(
            states,
            weight,
            target,
            group=mesh.tensor.group,
            distribution=Distribution(banned=tuple(range(290))),
            chunk_bytes=4 * arch.vocab * chunk,
        )
        (logprob.sum() + entropy.sum()).backward()
    return counter, saved.most


def count_update(policy: Policy, batches: list[Any]) -> tuple[OpCounter, int]:
    """Return what a whole update dispatches, its optimizer included."""
    loss = partial(token_loss, cfg=Algorithm(kl=0.0))
    policy.update(batches, loss, Distribution(), 0)
    saved = _Saved({p.untyped_storage().data_ptr() for p in policy.chunks[0].parameters()})
    with OpCounter() as counter, saved.hooks():
        policy.update(batches, loss, Distribution(), 1)
    return counter, saved.most
