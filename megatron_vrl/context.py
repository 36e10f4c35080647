"""Composition root: build the concrete classes that a configuration names.

`RunContext` holds everything that a training loop works with. `ENGINES` maps rollout.placement to
the rollout engine. No other module chooses a class by a configuration value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.config import Data, RunConfig, Video
from megatron_vrl.config.inference import inference_files
from megatron_vrl.data.datasets import Datasets
from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.precision import DTYPES
from megatron_vrl.models.vocabulary import check_tokenizer
from megatron_vrl.observe.clock import Clock
from megatron_vrl.observe.profiler import StepProfiler
from megatron_vrl.parallel.mesh import Mesh, init_mesh, raise_on_all_ranks
from megatron_vrl.policy.policy import Policy
from megatron_vrl.policy.vision_cache import VisionEmbeddingCache, embed_across_ranks
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.rewards.overlong import Overlong
from megatron_vrl.rollout.backends import start_engine
from megatron_vrl.rollout.in_process import InProcessEngine
from megatron_vrl.rollout.interfaces import Checksums, Generator, WeightSync
from megatron_vrl.rollout.manager import RolloutManager
from megatron_vrl.rollout.replay import ReplayEngine, ReplayFiles
from megatron_vrl.rollout.vllm.special_tokens import banned_token_ids
from megatron_vrl.rollout.weight_sync import (
    InProcessSync,
    Transform,
    WeightVerifier,
    WorkerSync,
    transform_of,
)
from megatron_vrl.rollout.workers.pool import WorkerPool
from megatron_vrl.rollout.workers.worker_info import served_model
from megatron_vrl.types import Prompt
from megatron_vrl.video import VideoReader
from megatron_vrl.video.image import image_rules
from megatron_vrl.video.rules import PixelRules

# Return the prompts with vision embeddings if rollout.visual_input asks for them, else unchanged.
# Every rank calls it, with its own prompts.
Embed = Callable[[Sequence[Prompt]], list[Prompt]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """Result of the start-up check (`trainer.dry_run.check`), which `build` need not repeat."""

    notes: list[str]  # for the user: sizes, layout, files that are not on this machine
    arch: Architecture  # fits the layout, the batches and the longest prompt
    hf_dir: Path  # config, tokenizer and processor files of model.checkpoint
    encoder: PromptEncoder | None  # None: the checkpoint is not on this machine
    datasets: Datasets  # with the annotations that the check parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContext:
    """Components that a run is restored into, before the rollout engine starts."""

    mesh: Mesh
    policy: Policy
    saver: Saver


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Components of a run on this rank."""

    cfg: RunConfig
    mesh: Mesh
    clock: Clock
    profiler: StepProfiler  # context manager around a step
    arch: Architecture
    policy: Policy
    saver: Saver
    rollout_manager: RolloutManager
    reward_manager: RewardManager
    reader: VideoReader
    encoder: PromptEncoder
    prompts: PromptPipeline  # of `reader` and `encoder`
    embed: Embed
    datasets: Datasets  # annotations that are parsed already
    hf_dir: Path  # config, tokenizer and processor files of the checkpoint


def prompt_encoder(hf_dir: Path, arch: Architecture, data: Data) -> PromptEncoder:
    """Return the prompt encoder of a checkpoint.

    Raises CheckpointError if the tokenizer does not load or has tokens without an embedding.
    """
    encoder = PromptEncoder(
        hf_dir,
        arch,
        data.system_prompt,
        data.max_prompt_tokens,
        data.question,
        data.timestamps,
    )
    check_tokenizer(encoder.tokenizer, arch, hf_dir)
    return encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutInputs:
    """Inputs that the builder of each `rollout.placement` takes."""

    cfg: RunConfig
    mesh: Mesh
    hf_dir: Path
    arch: Architecture
    export: WeightExport
    banned_token_ids: tuple[int, ...]


def _colocated(inputs: RolloutInputs) -> RolloutManager:
    transform = _transform(inputs)
    engine = InProcessEngine(start_engine(inputs.cfg, inputs.hf_dir))
    sync = InProcessSync(inputs.mesh, inputs.export, engine, transform)
    return _manager(inputs, engine, sync, _verifier(inputs, engine.checksums))


def _workers(inputs: RolloutInputs) -> RolloutManager:
    cfg, mesh = inputs.cfg, inputs.mesh
    served = served_model(cfg, inputs.hf_dir, inputs.banned_token_ids)
    pool = WorkerPool(cfg.rollout, served, mesh.device)
    sync = WorkerSync(mesh, inputs.export, pool, _transform(inputs))
    verifier = _verifier(inputs, pool.checksums if mesh.rank == 0 else dict)
    return _manager(inputs, pool, sync, verifier)


def _replay(inputs: RolloutInputs) -> RolloutManager:
    cfg = inputs.cfg
    files = ReplayFiles(cfg.rollout.replay_dir, loud=inputs.mesh.rank == 0)
    engine = ReplayEngine(files, importance_weights=cfg.algorithm.rollout_is != "none")
    return _manager(inputs, engine, engine, verifier=None)


PLACEMENTS: dict[str, Callable[[RolloutInputs], RolloutManager]] = {
    "colocated": _colocated,
    "workers": _workers,
    "replay": _replay,
}


def _transform(inputs: RolloutInputs) -> Transform:
    """Return what happens to weights before they are sent."""
    return transform_of(inputs.cfg.rollout.quantization, family_of(inputs.arch).weights)


def _manager(
    inputs: RolloutInputs, generator: Generator, sync: WeightSync, verifier: WeightVerifier | None
) -> RolloutManager:
    return RolloutManager(
        inputs.cfg.rollout, inputs.mesh, generator, sync, verifier, inputs.banned_token_ids
    )


def _verifier(
    inputs: RolloutInputs, engine_checksums: Callable[[], dict[str, Checksums]]
) -> WeightVerifier | None:
    """Return the comparison of weights, or None for an engine that converts them to FP8."""
    cfg = inputs.cfg
    if cfg.rollout.quantization == "fp8":
        return None
    return WeightVerifier(
        inputs.mesh,
        inputs.export,
        _transform(inputs),
        DTYPES[cfg.model.dtype],
        engine_checksums,
    )


def _embed(cfg: RunConfig, policy: Policy) -> Embed:
    if cfg.rollout.visual_input == "pixels":
        return list
    first = policy.mesh.pipeline.rank == 0
    cache = VisionEmbeddingCache(policy, cfg.rollout.embedding_cache_mib) if first else None
    return partial(embed_across_ranks, cache, policy.mesh)


def build_policy(cfg: RunConfig, checked: CheckedRun) -> PolicyContext:
    """Join the other ranks and build the model. Its weights are loaded by the caller.

    Raises UserError on every rank alike.
    """
    if checked.encoder is None:
        raise CheckpointError(
            f"There is no checkpoint {cfg.model.checkpoint}: set model.checkpoint."
        )
    mesh = init_mesh(cfg.parallel, cfg.run.seed, cfg.model.fp8)
    torch.use_deterministic_algorithms(cfg.run.deterministic)
    policy = Policy(checked.arch, cfg.model, cfg.parallel, mesh, cfg.run.seed)
    saver = Saver(
        Path(cfg.run.out_dir) / "checkpoints",
        policy,
        checked.hf_dir,
        keep=cfg.checkpoint.keep,
        asynchronous=cfg.checkpoint.asynchronous,
        files=inference_files(cfg),
    )
    return PolicyContext(mesh=mesh, policy=policy, saver=saver)


def media_reader(video: Video, data: Data, pixels: PixelRules, hf_dir: str | Path) -> VideoReader:
    """Return the reader of a run's videos and images. Raises UserError."""
    rules = image_rules(hf_dir, pixels, data.image_min_pixels, data.image_max_pixels)
    return VideoReader(video, pixels, rules)


def build(cfg: RunConfig, checked: CheckedRun, trained: PolicyContext) -> RunContext:
    """Start the rollout engine and build the rest. Raises UserError on every rank alike."""
    mesh, policy, encoder = trained.mesh, trained.policy, checked.encoder
    assert encoder is not None, "see build_policy"
    with raise_on_all_ranks(mesh):
        overlong = Overlong(
            limit=cfg.rollout.max_response_tokens,
            buffer=cfg.algorithm.overlong_buffer,
            weight=cfg.algorithm.overlong_penalty,
        )
        reward_manager = RewardManager(cfg.rewards, overlong)
    family = family_of(checked.arch)
    banned = banned_token_ids(encoder.tokenizer, family.prompt, checked.arch.vocab)
    dtype = DTYPES[cfg.model.dtype]
    reader = media_reader(cfg.video, cfg.data, family.pixels, checked.hf_dir)
    return RunContext(
        cfg=cfg,
        mesh=mesh,
        clock=Clock(),
        profiler=StepProfiler(Path(cfg.run.out_dir), cfg.observe, mesh.rank),
        arch=checked.arch,
        policy=policy,
        saver=trained.saver,
        rollout_manager=PLACEMENTS[cfg.rollout.placement](
            RolloutInputs(
                cfg=cfg,
                mesh=mesh,
                hf_dir=checked.hf_dir,
                arch=checked.arch,
                export=WeightExport(policy.chunks, dtype),
                banned_token_ids=banned,
            )
        ),
        reward_manager=reward_manager,
        reader=reader,
        encoder=encoder,
        prompts=PromptPipeline(reader, encoder),
        embed=_embed(cfg, policy),
        datasets=checked.datasets,
        hf_dir=checked.hf_dir,
    )
