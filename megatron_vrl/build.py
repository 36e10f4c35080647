"""Composition root: names in the config -> concrete parts. Nothing else picks classes.

`Parts` is what the loops work with. Its helpers hide which rank does what: a step's samples are
dealt over all ranks for decoding and rollout, and each model replica ends up with its own share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megatron_vrl.config import RunConfig, Source, check_batches
from megatron_vrl.data.mix import load
from megatron_vrl.data.prompt import PromptEncoder, VisionTokens
from megatron_vrl.errors import RolloutError, VideoError
from megatron_vrl.model.architecture import Architecture, read_architecture
from megatron_vrl.model.chunks import check_divides
from megatron_vrl.model.precision import DTYPES
from megatron_vrl.model.weights import published_tensors
from megatron_vrl.observe.clock import Clock
from megatron_vrl.parallel.mesh import Mesh, agreed, gather_objects, init_mesh
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.engine import ColocatedEngine, SamplingSpec
from megatron_vrl.training.checkpoint import load_weights
from megatron_vrl.training.layout import published_files
from megatron_vrl.training.policy import Policy
from megatron_vrl.training.saver import Saver
from megatron_vrl.types import Prompt, Rollout, VideoSample
from megatron_vrl.video import VideoReader
from megatron_vrl.video.pyav import probe

Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True)
class Parts:
    cfg: RunConfig
    mesh: Mesh
    clock: Clock
    arch: Architecture
    policy: Policy
    saver: Saver
    engine: ColocatedEngine
    reader: VideoReader
    encoder: PromptEncoder
    published_dir: Path  # config, tokenizer and processor files of the checkpoint
    engine_version: int = -1  # weights the engine holds; -1: none yet
    pushes: int = 0

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
        with agreed(self.mesh):
            return load(sources, self.cfg.run.seed, lambda path: probe(path).duration_s)

    def encode(self, samples: Sequence[VideoSample]) -> list[Prompt]:
        """Decode and tokenise; every rank calls it, each with its own samples.

        Raises on every rank if a video of any rank cannot be read.
        """
        prompts: list[Prompt] = []
        with agreed(self.mesh):
            videos = self.reader.encode([sample.video for sample in samples])
            for sample, video in zip(samples, videos, strict=True):
                if isinstance(video, VideoError):
                    raise video
                prompts.append(self.encoder.prompt(sample, video))
        return prompts

    def generate(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[list[Rollout]]:
        """`spec.n` answers to each of this rank's prompts; the engine sleeps afterwards.

        Every rank calls it. Raises on every rank if one engine refuses.
        """
        with agreed(self.mesh):
            self.engine.wake()
            answers = self.engine.generate(prompts, spec) if prompts else []
            self.engine.sleep()
        return answers

    def push_weights(self, version: int) -> None:
        """Hand the trainer's weights to the engines, unless they hold this version already."""
        if self.engine_version == version:
            return
        self.engine.wake()
        self.engine.push_weights(published_tensors(self.policy.chunks), version)
        self.engine_version = version
        if self.pushes % self.cfg.rollout.check_weights_every == 0:
            self._check_engine_weights()
        self.pushes += 1

    def _check_engine_weights(self) -> None:
        """Raises RolloutError if the engine computes with other weights than the trainer's."""
        dtype = DTYPES[self.cfg.model.dtype]
        ours = tensor_checksums(published_tensors(self.policy.chunks), dtype)
        with agreed(self.mesh):
            theirs = self.engine.weights_checksum()
            wrong = sorted(name for name in ours if theirs.get(name) != ours[name])
            if wrong:
                raise RolloutError(
                    f"After a hand-over the engine of rank {self.mesh.rank} differs from the "
                    f"trainer in {len(wrong)} tensors, first {wrong[0]}: check the vllm version."
                )


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


def build(cfg: RunConfig) -> Parts:
    """Join the other ranks and build everything. Raises UserError on every rank alike."""
    published_dir = published_files(cfg.model.checkpoint)
    arch = read_architecture(published_dir)
    check_divides(arch, cfg.model, cfg.parallel)
    mesh = init_mesh(cfg.parallel, cfg.run.seed)
    check_batches(cfg, mesh.data.size)
    torch.use_deterministic_algorithms(cfg.run.deterministic)
    policy = Policy(arch, cfg.model, cfg.parallel, mesh)
    load_weights(cfg.model.checkpoint, policy)
    longest_answer = max(cfg.rollout.max_response_tokens, cfg.evaluation.max_response_tokens)
    engine = ColocatedEngine(
        str(published_dir),
        cfg.rollout,
        dtype=cfg.model.dtype,
        seed=cfg.run.seed,
        max_model_len=cfg.data.max_prompt_tokens + longest_answer,
    )
    return Parts(
        cfg=cfg,
        mesh=mesh,
        clock=Clock(),
        arch=arch,
        policy=policy,
        saver=Saver(
            Path(cfg.run.out_dir) / "checkpoints",
            policy,
            published_dir,
            keep=cfg.checkpoint.keep,
            asynchronous=cfg.checkpoint.asynchronous,
        ),
        engine=engine,
        reader=VideoReader(cfg.video),
        encoder=PromptEncoder(
            published_dir, vision_tokens(arch), cfg.data.system_prompt, cfg.data.max_prompt_tokens
        ),
        published_dir=published_dir,
    )
