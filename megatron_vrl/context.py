"""Composition root: names in the config -> concrete parts. Nothing else picks classes.

`RunContext` is what the loops work with. Its helpers hide which rank does what: a step's samples
are dealt over all ranks for decoding and rollout, and each model replica ends up with its own
share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch

from megatron_vrl.checkpoint.checkpoint import load_weights
from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.checkpoint.layout import hf_dir_of
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.config import RunConfig, Source, check_batches
from megatron_vrl.config.inference import inference_files
from megatron_vrl.data.mix import load, open_pool
from megatron_vrl.data.pool import Pool
from megatron_vrl.data.prompt import PromptEncoder, VisionTokens
from megatron_vrl.errors import VideoError
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.pipeline_split import check_divides
from megatron_vrl.models.precision import DTYPES
from megatron_vrl.models.vocabulary import check_tokenizer
from megatron_vrl.observe.clock import Clock
from megatron_vrl.observe.profiler import StepProfiler
from megatron_vrl.parallel.mesh import Mesh, gather_objects, init_mesh, raise_on_all_ranks
from megatron_vrl.policy.policy import Policy
from megatron_vrl.policy.vision_cache import VisionEmbeddingCache, embed_across_ranks
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.rollout.backends import start_engine
from megatron_vrl.rollout.in_process import InProcessEngine
from megatron_vrl.rollout.interfaces import Checksums, Generator, WeightSync
from megatron_vrl.rollout.manager import RolloutManager
from megatron_vrl.rollout.replay import ReplayEngine, ReplayFiles
from megatron_vrl.rollout.vllm.special_tokens import banned_token_ids
from megatron_vrl.rollout.weight_sync import (
    InProcessSync,
    WeightVerifier,
    WorkerSync,
    transform_of,
)
from megatron_vrl.rollout.workers.pool import WorkerPool
from megatron_vrl.rollout.workers.worker_info import served_model
from megatron_vrl.types import Prompt, VideoSample
from megatron_vrl.video import VideoReader

Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True)
class RunContext:
    cfg: RunConfig
    mesh: Mesh
    clock: Clock
    profiler: StepProfiler  # around a step
    arch: Architecture
    policy: Policy
    saver: Saver
    rollout_manager: RolloutManager
    reward_manager: RewardManager
    reader: VideoReader
    encoder: PromptEncoder
    look: Callable[[Sequence[Prompt]], list[Prompt]]  # at the videos, where their tokens are kept
    hf_dir: Path  # config, tokenizer and processor files of the checkpoint

    def replica_share(self, items: Sequence[Item]) -> list[Item]:
        """The items of this rank's model replica."""
        return list(items[self.mesh.data.rank :: self.mesh.data.size])

    def rank_share(self, items: Sequence[Item]) -> list[Item]:
        """The items this rank decodes and rolls out for its replica."""
        return self.replica_share(items)[self.mesh.model.rank :: self.mesh.model.size]

    def gather_replica(self, items: list[Item]) -> list[Item]:
        """Inverse of `rank_share`: the replica's items in order, on each of its ranks."""
        return interleave(gather_objects(self.mesh.model, items))

    def samples(self, sources: Sequence[Source]) -> list[VideoSample]:
        """Read annotation files; every rank calls it and gets the same samples."""
        with raise_on_all_ranks(self.mesh):
            return load(sources, self.cfg.run.seed, self.reader.duration_s)

    def pool(self, sources: Sequence[Source]) -> Pool:
        """What to draw training samples from; every rank calls it."""
        with raise_on_all_ranks(self.mesh):
            return open_pool(sources, self.cfg.run.seed, self.reader.duration_s)

    def encode(self, samples: Sequence[VideoSample]) -> list[Prompt | VideoError]:
        """Decode and tokenise; every rank calls it, each with its own samples. An error stands for
        a video that cannot be read."""
        made: list[Prompt | VideoError] = []
        with raise_on_all_ranks(self.mesh):
            videos = self.reader.encode([sample.clip for sample in samples])
            for sample, video in zip(samples, videos, strict=True):
                if isinstance(video, VideoError):
                    made.append(video)
                else:
                    made.append(self.encoder.prompt(sample, video))
        looked = iter(self.look([one for one in made if isinstance(one, Prompt)]))
        return [next(looked) if isinstance(one, Prompt) else one for one in made]


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """[[a0, a2], [a1]] -> [a0, a1, a2]: undoes dealing items out in turn."""
    longest = max(map(len, shares), default=0)
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def vision_tokens(arch: Architecture) -> VisionTokens:
    return VisionTokens(
        video_token=arch.video_token,
        image_token=arch.image_token,
        merge=arch.vision.merge,
        tokens_per_second=arch.vision.tokens_per_second,
    )


def prompt_encoder(
    hf_dir: Path,
    arch: Architecture,
    system_prompt: str,
    max_tokens: int,
    wording: Literal["default", "temporal_r1"] = "default",
) -> PromptEncoder:
    """Return the encoder of a checkpoint.

    Raises CheckpointError if its tokenizer does not load or has tokens without an embedding.
    """
    encoder = PromptEncoder(hf_dir, vision_tokens(arch), system_prompt, max_tokens, wording)
    check_tokenizer(encoder.tokenizer, arch, hf_dir)
    return encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutInputs:
    """What every value of `rollout.placement` is built from."""

    cfg: RunConfig
    mesh: Mesh
    hf_dir: Path
    export: WeightExport
    banned_token_ids: tuple[int, ...]


def _colocated(inputs: RolloutInputs) -> RolloutManager:
    transform = transform_of(inputs.cfg.rollout.quantization)
    engine = InProcessEngine(start_engine(inputs.cfg, inputs.hf_dir))
    sync = InProcessSync(inputs.mesh, inputs.export, engine, transform)
    return _manager(inputs, engine, sync, _verifier(inputs, engine.checksums))


def _workers(inputs: RolloutInputs) -> RolloutManager:
    cfg, mesh = inputs.cfg, inputs.mesh
    served = served_model(cfg, inputs.hf_dir, inputs.banned_token_ids)
    pool = WorkerPool(cfg.rollout, served, mesh.device)
    sync = WorkerSync(mesh, inputs.export, pool, transform_of(cfg.rollout.quantization))
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
        transform_of(cfg.rollout.quantization),
        DTYPES[cfg.model.dtype],
        engine_checksums,
    )


def _look(cfg: RunConfig, policy: Policy) -> Callable[[Sequence[Prompt]], list[Prompt]]:
    if cfg.rollout.visual_input == "pixels":
        return list
    first = policy.mesh.pipeline.rank == 0
    eyes = VisionEmbeddingCache(policy, cfg.rollout.embedding_cache_mib) if first else None
    return partial(embed_across_ranks, eyes, policy.mesh)


def build(cfg: RunConfig) -> RunContext:
    """Join the other ranks and build everything. Raises UserError on every rank alike."""
    hf_dir = hf_dir_of(cfg.model.checkpoint)
    arch = read_architecture(hf_dir)
    check_divides(arch, cfg.model, cfg.parallel)
    mesh = init_mesh(cfg.parallel, cfg.run.seed)
    check_batches(cfg, mesh.data.size)
    with raise_on_all_ranks(mesh):
        reward_manager = RewardManager(cfg.rewards)
        encoder = prompt_encoder(
            hf_dir,
            arch,
            cfg.data.system_prompt,
            cfg.data.max_prompt_tokens,
            cfg.data.question,
        )
    torch.use_deterministic_algorithms(cfg.run.deterministic)
    policy = Policy(arch, cfg.model, cfg.parallel, mesh)
    load_weights(cfg.model.checkpoint, policy)
    banned = banned_token_ids(encoder.tokenizer, arch.vocab)
    return RunContext(
        cfg=cfg,
        mesh=mesh,
        clock=Clock(),
        profiler=StepProfiler(Path(cfg.run.out_dir), cfg.observe, mesh.rank),
        arch=arch,
        policy=policy,
        saver=Saver(
            Path(cfg.run.out_dir) / "checkpoints",
            policy,
            hf_dir,
            keep=cfg.checkpoint.keep,
            asynchronous=cfg.checkpoint.asynchronous,
            files=inference_files(cfg),
        ),
        rollout_manager=PLACEMENTS[cfg.rollout.placement](
            RolloutInputs(
                cfg=cfg,
                mesh=mesh,
                hf_dir=hf_dir,
                export=WeightExport(policy.chunks, DTYPES[cfg.model.dtype]),
                banned_token_ids=banned,
            )
        ),
        reward_manager=reward_manager,
        reader=VideoReader(cfg.video),
        encoder=encoder,
        look=_look(cfg, policy),
        hf_dir=hf_dir,
    )
