"""Qwen2.5-VL on megatron.core, for training: micro-batch in, log-probs of its answers out.

The language model is Megatron's GPTModel with M-RoPE; the vision tower and the token embedding
live in the first chunk of layers, the log-prob head in the last. Logits exist only where a loss is
(`head.py`). Generation is vLLM's work and is not here.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import Architecture, padded_vocab
from megatron_vrl.models.fusion import gradient_fusion
from megatron_vrl.models.layers import BOTH_TOWERS, RECOMPUTE, layer_spec, packed
from megatron_vrl.models.logprob_head import Distribution, token_logprobs
from megatron_vrl.models.pipeline_split import Chunk, all_chunks, stage_chunks
from megatron_vrl.models.precision import attention_of, layer_parts, number_formats
from megatron_vrl.models.qwen2_5_vl.attention_plans import language_plan, varlen_plan
from megatron_vrl.models.qwen2_5_vl.vision import VisionTower
from megatron_vrl.parallel.arrays import as_tensor
from megatron_vrl.parallel.mesh import Mesh


def language_config(arch: Architecture, cfg: Model, parallel: Parallel) -> TransformerConfig:
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.mlp,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        mrope_section=list(arch.mrope_section),
        layernorm_epsilon=arch.norm_eps,
        add_bias_linear=False,
        **BOTH_TOWERS,
        gradient_accumulation_fusion=gradient_fusion(cfg, torch.cuda.is_available()).on,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        **_pipeline(arch, cfg, parallel),
        sequence_parallel=parallel.sequence,
        variable_seq_lengths=parallel.virtual == 1,  # gloo mixes up the interleaved one's shapes
        moe_token_dispatcher_type="alltoall",  # demanded by variable_seq_lengths, even without MoE
        batch_p2p_comm=False,  # on gloo the batched form is silently wrong between two ranks
        calculate_per_token_loss=True,  # gradients are summed; our token weights hold the divisor
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        **number_formats(cfg),
        **RECOMPUTE[cfg.recompute],
    )


def _pipeline(arch: Architecture, cfg: Model, parallel: Parallel) -> dict[str, Any]:
    """Megatron's words for our chunks of layers."""
    if parallel.pipeline == 1:
        return {}
    layout = [_megatron_chunk(chunk) for chunk in all_chunks(arch, cfg, parallel)]
    virtual = parallel.virtual if parallel.virtual > 1 else None
    return {
        "pipeline_model_parallel_layout": layout,
        "virtual_pipeline_model_parallel_size": virtual,
    }


def _megatron_chunk(chunk: Chunk) -> list[str]:
    layers = ["decoder"] * len(chunk.layers)
    return ["embedding"] * chunk.embeds + layers + ["loss"] * chunk.ends


def _without_context(mesh: Mesh) -> ProcessGroupCollection:
    """Megatron's groups, but no context parallelism: rows are shared out by us, and attention
    gathers keys and values itself, which serves any mask."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = mesh.alone
    return groups


class LanguageModel(GPTModel):
    """GPTModel that ends in hidden states: the head needs them only where a loss is."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class Qwen25VL(MegatronModule):
    """One chunk of the model: all of it, a pipeline stage, or a virtual stage."""

    def __init__(
        self, arch: Architecture, cfg: Model, parallel: Parallel, mesh: Mesh, virtual: int = 0
    ) -> None:
        config = language_config(arch, cfg, parallel)
        super().__init__(config=config)
        self.arch = arch
        self.mesh = mesh
        self.chunk = stage_chunks(arch, cfg, parallel, mesh.pipeline.rank)[virtual]
        self.model_type = ModelType.encoder_or_decoder  # asked for by the pipeline schedules
        self.pre_process = self.chunk.embeds
        self.post_process = self.chunk.ends
        self.vp_stage = virtual if parallel.virtual > 1 else None
        self.share_embeddings_and_output_weights = arch.tied_head
        self.vision: VisionTower | None = None
        if self.pre_process:
            self.vision = VisionTower(arch, mesh, config)
        self._sees_always = parallel.overlap
        in_buckets = attention_of(cfg, mesh.device) == "sdpa"
        self._plan = language_plan if in_buckets else varlen_plan
        last = layer_parts(cfg, arch.layers - 1, arch.layers, mesh.device)
        layers = [layer_parts(cfg, layer, arch.layers, mesh.device) for layer in self.chunk.layers]
        self.language = LanguageModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(parts) for parts in layers], layer_norm=last.norm
            ),
            vocab_size=padded_vocab(arch, parallel),
            max_sequence_length=arch.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=arch.tied_head,
            position_embedding_type="mrope",
            rotary_base=arch.rope_base,
            scatter_embedding_sequence_parallel=False,  # vision tokens are put in first
            pg_collection=_without_context(mesh),
            vp_stage=self.vp_stage,
        )
        self.to(config.params_dtype)  # norms are born in float32
        self._freeze(cfg)

    def forward(self, batch: MicroBatch, patches: Tensor | None, of: Distribution) -> Tensor:
        """On the last stage [2, N]: log-prob and entropy of every target; else hidden states.

        `patches` [P, patch values] of all visuals of the batch, None if their tokens were kept;
        only the first stage reads them.
        """
        device = self.mesh.device
        embeddings = self._embed(batch, patches) if self.pre_process else None
        positions = torch.from_numpy(batch.positions[:, batch.rows]).to(device)
        hidden = self.language(
            input_ids=None,
            position_ids=positions[:, None],  # [3, 1, L]
            attention_mask=None,
            decoder_input=embeddings,
            packed_seq_params=packed(
                len(batch.rows),
                device,
                plan=self._plan(batch, device),
                context=self.mesh.context.group,
                cp_group=self.mesh.alone,  # positions are this rank's already
            ),
        )  # [L (/ tensor), 1, C]
        return self._head(hidden, batch, of) if self.post_process else hidden

    def _embed(self, batch: MicroBatch, patches: Tensor | None) -> Tensor:
        """Word embeddings of this rank's rows, with vision tokens in the places of their pads."""
        token_ids = torch.from_numpy(batch.token_ids[batch.rows]).to(self.mesh.device)
        embeddings = self.language.embedding(input_ids=token_ids[None], position_ids=None)
        assert self.vision is not None
        if not batch.visuals and self._sees_always:
            embeddings = embeddings + 0 * self.vision.nothing().sum()
        if batch.visuals:
            tokens = self._vision_tokens(batch, patches)
            is_pad = np.isin(batch.token_ids, (self.arch.video_token, self.arch.image_token))
            number = (np.cumsum(is_pad) - 1)[batch.rows]  # of the vision token at each row
            here = np.flatnonzero(is_pad[batch.rows])
            places, chosen = (
                torch.from_numpy(index).to(self.mesh.device) for index in (here, number[here])
            )
            seen = tokens.index_select(0, chosen)[:, None]
            embeddings = embeddings.index_copy(0, places, seen.to(embeddings.dtype))
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        return embeddings  # [L (/ tensor), 1, C]

    def _vision_tokens(self, batch: MicroBatch, patches: Tensor | None) -> Tensor:
        if patches is None:
            return as_tensor(np.concatenate(batch.seen)).to(self.mesh.device)
        assert self.vision is not None
        return self.vision(patches, [visual.grid_thw for visual in batch.visuals])

    def _head(self, hidden: Tensor, batch: MicroBatch, of: Distribution) -> Tensor:
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        source = torch.from_numpy(batch.source).to(hidden.device)
        target = torch.from_numpy(batch.target).to(hidden.device)
        logprob, entropy = token_logprobs(
            hidden[:, 0].index_select(0, source),
            self.head_weight(),
            target,
            group=self.mesh.tensor.group,
            of=replace(of, banned=(*of.banned, *range(self.arch.vocab, self.language.vocab_size))),
        )
        return torch.stack([logprob, entropy])

    def head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return self.language.output_layer.weight

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Asked for by Megatron's gradient finalisation when the head is tied."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Called by Megatron's pipeline schedule with the previous stage's hidden states."""
        self.language.set_input_tensor(input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: the tower is a copy on every tensor rank."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, entry in state.items():
            if name.startswith(f"{prefix}vision."):
                entry.replica_id = (0, self.mesh.tensor.rank, self.mesh.batch.rank)
        return state

    def _freeze(self, cfg: Model) -> None:
        if cfg.freeze_language:
            self.language.requires_grad_(False)
        if self.vision is not None:
            for name, param in self.vision.named_parameters():
                frozen = cfg.freeze_merger if name.startswith("merger.") else cfg.freeze_vision
                param.requires_grad_(not frozen)
