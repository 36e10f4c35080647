"""Answers of a checkpoint from vLLM in one process, without a trainer, for the tools.

Prompts, video decoding and engine are those of training. A video that cannot be read costs only its
own questions. Left out: several processes. `mvrl select` splits its pool over processes with
`--shard`.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vrl import config
from megatron_vrl.checkpoint.convert import stored_tensors
from megatron_vrl.checkpoint.layout import hf_dir_of
from megatron_vrl.config.inference import read_inference
from megatron_vrl.config.loader import read_tree, validate_with_overrides
from megatron_vrl.context import media_reader, prompt_encoder
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.errors import CheckpointError, ConfigError, VideoError
from megatron_vrl.models.architecture import config_dtype, read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.observe.progress import log_engine_start
from megatron_vrl.rollout.backends import BACKENDS
from megatron_vrl.rollout.interfaces import InferenceEngine
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.storage.no_checkpoint import advice
from megatron_vrl.types import Media, Prompt, Rollout, Sample, Visual

Answers = list[Rollout] | VideoError


class InferenceConfig(config.Section):
    """Sections of a run's configuration that an answer depends on."""

    model: config.Model
    video: config.Video = config.Video()
    data: config.Data = config.Data()
    rollout: config.RolloutConfig = config.RolloutConfig()
    evaluation: config.Evaluation = config.Evaluation()


def inference_config(
    checkpoint: str,
    overrides: Sequence[str],
    run_config: str = "",
    defaults: dict[str, dict[str, Any]] | None = None,
) -> InferenceConfig:
    """Return the configuration to ask `checkpoint` with.

    A later source replaces an earlier one: `inference.yaml` of the checkpoint, `defaults`, the
    YAML file `run_config`, `overrides`. The engine computes in the dtype of the checkpoint.
    """
    directory = hf_dir_of(checkpoint)
    if not Path(checkpoint).is_dir():
        known = (
            advice(Path(checkpoint)) or f"There is no checkpoint {checkpoint}: give a directory."
        )
        raise CheckpointError(known)
    read_architecture(directory)  # raises CheckpointError if config.json is wrong
    dtype = config_dtype(directory) or "float32"
    tree = read_inference(directory)
    for name, keys in (defaults or {}).items():
        tree[name] = tree.get(name, {}) | keys
    if run_config:
        given = read_tree(run_config)
        for name in InferenceConfig.model_fields:
            tree[name] = tree.get(name, {}) | (given.get(name) or {})
    tree["model"] = tree.get("model", {}) | {"checkpoint": checkpoint, "dtype": dtype}
    return validate_with_overrides(InferenceConfig, tree, overrides, run_config or "command line")


class Answerer:
    """Prompt pipeline and inference engine of one checkpoint."""

    def __init__(self, cfg: InferenceConfig, max_response_tokens: int) -> None:
        """Check the checkpoint. The engine starts with the first prompt. Raises UserError."""
        self._cfg = cfg
        self._directory = hf_dir_of(cfg.model.checkpoint)
        arch = read_architecture(self._directory)
        encoder = prompt_encoder(self._directory, arch, cfg.data)
        pixels = family_of(arch).pixels
        self._reader = media_reader(cfg.video, cfg.data, pixels, self._directory)
        self._prompts = PromptPipeline(self._reader, encoder)
        longest = cfg.data.max_prompt_tokens + max_response_tokens
        self._max_model_len = min(longest, arch.max_positions)

    @cached_property
    def _engine(self) -> InferenceEngine:
        checkpoint, cfg = self._cfg.model.checkpoint, self._cfg.rollout
        log_engine_start(checkpoint)
        engine = BACKENDS[cfg.backend](
            str(self._directory),
            cfg,
            dtype=self._cfg.model.dtype,
            seed=0,
            max_model_len=self._max_model_len,
        )
        engine.push_weights(stored_tensors(Path(checkpoint)), 0)
        return engine

    def answer(
        self, samples: Sequence[Sample], spec: SamplingSpec, batch_size: int
    ) -> Iterator[tuple[Sample, Answers]]:
        """Yield each sample with its `spec.n` answers, or with the error of its video, in order.

        The frames of `batch_size` samples are in memory at a time. Raises ConfigError if a prompt
        and its answer may not fit the engine.
        """
        for start in range(0, len(samples), batch_size):
            block = samples[start : start + batch_size]
            loaded = self._prompts.load(block)
            prompts = [one for one in loaded if isinstance(one, Prompt)]
            self._check_length(prompts, spec)
            rollouts = iter(self._engine.generate(prompts, spec) if prompts else [])
            for sample, one in zip(block, loaded, strict=True):
                yield sample, one if isinstance(one, VideoError) else next(rollouts)

    def answer_greedily(
        self, samples: Sequence[Sample], max_tokens: int, batch_size: int
    ) -> Iterator[tuple[Sample, Rollout | VideoError]]:
        """Yield each sample with its greedy answer, or with the error of its video, in order."""
        for sample, answers in self.answer(samples, SamplingSpec.greedy(max_tokens), batch_size):
            yield sample, answers if isinstance(answers, VideoError) else answers[0]

    def read(self, media: Sequence[Media]) -> list[Visual]:
        """Return the frames and images that the model sees. Raises the first VideoError."""
        visuals: list[Visual] = []
        for visual in self._reader.read(media):
            if isinstance(visual, VideoError):
                raise visual
            visuals.append(visual)
        return visuals

    def _check_length(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> None:
        """Raises ConfigError if a prompt and its answer may not fit the engine."""
        for prompt in prompts:
            if len(prompt.token_ids) + spec.max_tokens > self._max_model_len:
                raise ConfigError(
                    f"The prompt of {prompt.id} needs {len(prompt.token_ids)} tokens and the "
                    f"answer may take {spec.max_tokens}, the model reads {self._max_model_len}: "
                    "pass the training config (--config RUN/config.yaml), or lower "
                    "video.total_pixels or evaluation.max_response_tokens."
                )
