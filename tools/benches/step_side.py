"""One side of `bench.py step`: `step_side.py LAYOUT PROMPT ANSWER GROUP MICRO_BATCH_TOKENS`."""

import sys
from functools import partial

import numpy as np
import torch

from benches.worker import resident, serve
from megatron_vrl.algorithms import token_loss
from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.config import Algorithm, Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.parallel.mesh import init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.types import Prompt

VOCAB = 4096
PASSES = {"shared": 3, "plain": 3, "shared-kl": 4, "temporal_r1": 5}  # an update is three

VISION = VisionArchitecture(
    hidden=32,
    mlp=48,
    layers=1,
    heads=2,
    patch=14,
    temporal_patch=2,
    merge=2,
    window=56,
    full_attention_layers=(0,),
    channels=3,
    tokens_per_second=2,
)
ARCHITECTURE = Architecture(
    family="qwen2_5_vl",
    hidden=512,
    mlp=1408,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=64,
    vocab=VOCAB,
    rope_base=1e6,
    mrope_section=(8, 12, 12),
    norm_eps=1e-6,
    tied_head=True,
    max_positions=32768,
    video_token=VOCAB - 1,
    image_token=VOCAB - 2,
    vision_start_token=VOCAB - 3,
    vision_end_token=VOCAB - 4,
    qkv_bias=True,
    vision=VISION,
)


def group(prompt_tokens: int, answer_tokens: int, answers: int) -> Group:
    """Return a group of random tokens; video and text tokens cost the language model alike."""
    rng = np.random.default_rng(0)
    return Group(
        prompt=Prompt(
            id="bench",
            visuals=(),
            token_ids=rng.integers(0, VOCAB - 8, prompt_tokens),
            engine_token_ids=(),
            positions=np.tile(np.arange(prompt_tokens), (3, 1)),
        ),
        answers=tuple(
            Answer(
                token_ids=rng.integers(0, VOCAB - 8, answer_tokens),
                advantage=float(rng.normal()),
                engine_logprobs=np.full(answer_tokens, -np.log(VOCAB), dtype=np.float32),
            )
            for _ in range(answers)
        ),
    )


def main(layout: str, prompt: int, answer: int, answers: int, budget: int) -> None:
    silence_libraries()
    torch.set_num_threads(1)
    mesh = init_mesh(Parallel(), seed=1)
    held_before = resident()
    model = Model(checkpoint="none", dtype="float32", freeze_vision=True, freeze_merger=True)
    policy = Policy(ARCHITECTURE, model, Parallel(), mesh)
    policy.start_phase(Optimizer(lr=1e-6), num_steps=10**6)
    rows = Batch(tokens=budget, layout="shared" if layout.startswith("shared") else "plain")
    whole = group(prompt, answer, answers)
    batches = plan_batches([whole], whole, rows, mesh)
    refers = layout in ("shared-kl", "temporal_r1")
    cfg = Algorithm(kl=0.01 if refers else 0.0)
    if refers:
        policy.keep_reference()

    def once() -> None:
        old = policy.logprobs(batches, Distribution()) if layout == "temporal_r1" else None
        kept = policy.reference_logprobs(batches, Distribution()) if refers else None
        loss = partial(token_loss, cfg=cfg)
        update = policy.update(batches, loss, Distribution(), 0, old=old, reference=kept)
        assert update.applied

    tokens = sum(len(batch.token_ids) for batch in batches)
    fixed = {"tokens": tokens, "passes": tokens * PASSES[layout]}
    serve(once, held_before=held_before, fixed=fixed)


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    main(name, *map(int, sizes))
