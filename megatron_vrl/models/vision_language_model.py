"""Vision-language model on megatron.core: maps a micro-batch to the log-probs of its answers.

The family of the model gives the vision tower and what is its own of the language model
(`ModelParts`). The language model is Megatron's GPTModel with M-RoPE. The first chunk of layers
holds the vision tower and the token embedding, the last chunk holds the log-prob head. Logits are
computed only for tokens that have a loss (`models/logprob_head.py`). Generation is done by vLLM
(`megatron_vrl/rollout`).
"""

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
from megatron_vrl.models.attention import packed_params, with_additive_masks
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.families import family_of
from megatron_vrl.models.fusion import gradient_fusion
from megatron_vrl.models.inputs import PassInputs, pass_inputs
from megatron_vrl.models.layers import COMMON_CONFIG
from megatron_vrl.models.logprob_head import Distribution, token_logprobs
from megatron_vrl.models.lora import add_adapters
from megatron_vrl.models.pipeline_split import all_chunks, stage_chunks
from megatron_vrl.models.precision import attention_backend, layer_modules, precision_config
from megatron_vrl.models.recompute import language_recompute
from megatron_vrl.models.rotary import TablesOfAngles
from megatron_vrl.models.vision_tower import MERGER, VisionTower
from megatron_vrl.parallel.arrays import upload
from megatron_vrl.parallel.mesh import Mesh


def language_config(arch: Architecture, cfg: Model, parallel: Parallel) -> TransformerConfig:
    """Return Megatron's TransformerConfig of the language model."""
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.mlp,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        mrope_section=list(arch.mrope_section),
        layernorm_epsilon=arch.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        **COMMON_CONFIG,
        gradient_accumulation_fusion=gradient_fusion(cfg, on_gpu).enabled,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        **_pipeline(arch, cfg, parallel),
        sequence_parallel=parallel.sequence,
        variable_seq_lengths=parallel.virtual == 1,  # see `policy/pipeline.py`
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, even without MoE
        batch_p2p_comm=on_gpu,  # with gloo, batched p2p between two ranks returns wrong data
        batch_p2p_sync=False,  # a wait of the host for each message, for old versions of torch
        calculate_per_token_loss=True,  # sum gradients; token weights include the divisor
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        **precision_config(cfg),
        **language_recompute(cfg, arch.layers),
    )


def _pipeline(arch: Architecture, cfg: Model, parallel: Parallel) -> dict[str, Any]:
    """Return the TransformerConfig fields that describe the chunks of layers; {} for one stage."""
    if parallel.pipeline == 1:
        return {}
    layout = [_megatron_chunk(chunk) for chunk in all_chunks(arch, cfg, parallel)]
    virtual = parallel.virtual if parallel.virtual > 1 else None
    return {
        "pipeline_model_parallel_layout": layout,
        "virtual_pipeline_model_parallel_size": virtual,
    }


def _megatron_chunk(chunk: Chunk) -> list[str]:
    """Return one chunk as Megatron's pipeline layout names its layers."""
    layers = ["decoder"] * len(chunk.layers)
    return ["embedding"] * chunk.pre_process + layers + ["loss"] * chunk.post_process


def _without_context(mesh: Mesh) -> ProcessGroupCollection:
    """Return Megatron's process groups with a context-parallel group of size 1.

    Megatron must not split the sequence: `shard_context` has already selected this rank's rows, and
    the attention gathers keys and values itself, which works with any mask.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = mesh.alone
    return groups


class LanguageModel(GPTModel):
    """GPTModel that returns hidden states instead of logits.

    VisionLanguageModel applies the head to the rows that have a loss.
    """

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Override of GPTModel's output layer; return `hidden_states` unchanged."""
        return hidden_states


class VisionLanguageModel(MegatronModule):
    """One chunk of a model: the whole model, a pipeline stage or a virtual stage.

    Example: with pipeline 2 and virtual 2 each rank holds two such modules; chunk 0 (rank 0,
    virtual 0) has the vision tower and the embedding, chunk 3 (rank 1, virtual 1) has the head.
    """

    def __init__(
        self, arch: Architecture, cfg: Model, parallel: Parallel, mesh: Mesh, virtual: int = 0
    ) -> None:
        parts = family_of(arch).parts()
        config = language_config(arch, cfg, parallel)
        super().__init__(config=config)
        self.arch = arch
        self.mesh = mesh
        self.chunk = stage_chunks(arch, cfg, parallel, mesh.pipeline.rank)[virtual]
        self.model_type = ModelType.encoder_or_decoder  # read by the pipeline schedules
        self.pre_process = self.chunk.pre_process
        self.post_process = self.chunk.post_process
        self.vp_stage = virtual if parallel.virtual > 1 else None
        self.share_embeddings_and_output_weights = arch.tied_head
        self.vision: VisionTower | None = None
        if self.pre_process:
            self.vision = parts.tower(arch, cfg, mesh, config)
        self._vision_inputs = parts.vision_inputs
        self._always_run_vision = parallel.overlap
        self._attention = attention_backend(cfg, mesh.device)
        last = layer_modules(cfg, arch.layers - 1, arch.layers, mesh.device)
        layers = [
            layer_modules(cfg, layer, arch.layers, mesh.device) for layer in self.chunk.layers
        ]
        self.language = LanguageModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[parts.language_layer(modules) for modules in layers],
                layer_norm=last.norm,
            ),
            vocab_size=padded_vocab(arch, parallel),
            max_sequence_length=arch.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=arch.tied_head,
            position_embedding_type="mrope",
            rotary_base=arch.rope_base,
            scatter_embedding_sequence_parallel=False,  # vision embeddings are inserted first
            pg_collection=_without_context(mesh),
            vp_stage=self.vp_stage,
        )
        own, sections = parts.rotary_angles, self.language.rotary_pos_emb
        angles = sections if own is None else own(arch, mesh.device)
        self.language.rotary_pos_emb = TablesOfAngles(angles, config.params_dtype)
        self.to(config.params_dtype)  # RMSNorm creates float32 weights
        self._adapted = cfg.lora.rank > 0
        if self._adapted:
            add_adapters(self, arch, cfg.lora, self.chunk, mesh.tensor, parallel.sequence)
        else:
            self._freeze(cfg)

    def inputs(self, batch: MicroBatch) -> PassInputs:
        """Return what the passes of every chunk read of a micro-batch, on the device."""
        return pass_inputs(
            batch,
            self.arch,
            self.mesh,
            self._vision_inputs,
            attention=self._attention,
            sequence=self.config.sequence_parallel,
        )

    def forward(
        self,
        inputs: PassInputs,
        patches: Tensor | None,
        distribution: Distribution,
        *,
        encoded: Tensor | None = None,
    ) -> Tensor:
        """Return log-prob and entropy [2, N] of every target on the last stage, else hidden states.

        `patches` [P, patch values] holds the patches of all visuals of the batch, or `encoded` what
        the tower made of this rank's (`VisionTower.encode`). Only the first stage reads them. If
        both are None, `batch.visual_embeds` holds precomputed vision embeddings.
        """
        embeddings = features = None
        if self.pre_process:
            embeddings, features = self._embed(inputs, patches, encoded)
        hidden = self.language(
            input_ids=None,
            position_ids=inputs.positions,
            attention_mask=None,
            decoder_input=embeddings,
            packed_seq_params=packed_params(
                plan=with_additive_masks(inputs.plan, self.config.params_dtype),
                context=self.mesh.context.group,
                cp_group=self.mesh.alone,  # positions are already this rank's shard
                deepstack_rows=inputs.deepstack_rows,
            ),
            extra_block_kwargs={"context": features},  # see `qwen3_vl/deepstack.py`
        )  # [L (/ tensor), 1, C]
        return self._head(hidden, inputs, distribution) if self.post_process else hidden

    def _embed(
        self, inputs: PassInputs, patches: Tensor | None, encoded: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input embeddings [L (/ tensor), 1, C] of this rank's rows, and the DeepStack
        features [D, n, C] of those n rows that are vision tokens, or None.

        Vision embeddings replace the word embeddings of vision pad tokens.
        """
        embeddings = self.language.embedding(input_ids=inputs.token_ids, position_ids=None)
        assert self.vision is not None
        if not inputs.batch.visuals and self._always_run_vision:
            embeddings = embeddings + 0 * self.vision.dummy_token().sum()
        features = None
        if inputs.batch.visuals:
            tokens = self._vision_tokens(inputs, patches, encoded)
            if self.arch.vision.deepstack_layers:
                tokens, others = tokens.tensor_split([self.arch.hidden], dim=1)
                features = self._features(others.to(embeddings.dtype), inputs)
            tokens = tokens.index_select(0, inputs.vision_index)
            tokens = tokens[:, None].to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, inputs.vision_rows, tokens)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        if self._adapted and not embeddings.requires_grad:  # recompute follows gradients of inputs
            embeddings = embeddings.detach().requires_grad_()
        return embeddings, features

    def _features(self, features: Tensor, inputs: PassInputs) -> Tensor:
        """Return the DeepStack features [D, n, C] of this rank's rows, of those of all vision
        tokens of the batch [tokens, D * C]."""
        if self.config.sequence_parallel:  # a tensor rank has the gradient of its own rows only
            features = copy_to_tensor_model_parallel_region(features)
        own = features.index_select(0, inputs.deepstack_index)
        return own.unflatten(1, (-1, self.arch.hidden)).transpose(0, 1)

    def _vision_tokens(
        self, inputs: PassInputs, patches: Tensor | None, encoded: Tensor | None
    ) -> Tensor:
        """Return the vision embeddings [tokens, (1 + D) * C] of all visuals of the batch,
        precomputed or encoded now."""
        if inputs.vision is None:
            return upload(np.concatenate(inputs.batch.visual_embeds), self.mesh.device)
        assert self.vision is not None
        if patches is not None:
            encoded = self.vision.encode(patches, inputs.vision)
        return self.vision(encoded, inputs.vision)

    def _head(self, hidden: Tensor, inputs: PassInputs, distribution: Distribution) -> Tensor:
        """Return log-prob and entropy [2, N] of the batch's targets from hidden states [L (/
        tensor), 1, C]."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        logprob, entropy = token_logprobs(
            hidden[:, 0].index_select(0, inputs.source),
            self.head_weight(),
            inputs.target,
            group=self.mesh.tensor.group,
            distribution=distribution,
            vocab=self.arch.vocab,
        )
        return torch.stack([logprob, entropy])

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the output layer, which are the embedding's if the head is
        tied."""
        if self.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return self.language.output_layer.weight

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the tied weight. Megatron's gradient finalisation calls it when the head is
        tied."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Set the previous stage's hidden states. Megatron's pipeline schedule calls it."""
        self.language.set_input_tensor(input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the state dict for Megatron's distributed checkpoints.

        Every tensor rank holds a full copy of the vision tower; `replica_id` says which copy this
        is.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, entry in state.items():
            if name.startswith(f"{prefix}vision."):
                entry.replica_id = (0, self.mesh.tensor.rank, self.mesh.batch.rank)
        return state

    def _freeze(self, cfg: Model) -> None:
        """Turn off gradients of the modules that `model.freeze_*` names."""
        if cfg.freeze_language:
            self.language.requires_grad_(False)
        if self.vision is not None:
            for name, param in self.vision.named_parameters():
                frozen = cfg.freeze_merger if name.startswith(MERGER) else cfg.freeze_vision
                param.requires_grad_(not frozen)
