"""Update of one group, n answers to a prompt with a video, on random weights of a real size.

The update is that of a run: vision tower forward, language model and head forward and backward,
gradients in float32, AdamW. Number formats and layouts take turns on one model, so that nothing
else differs: `bfloat16`, and Transformer Engine's FP8 with `delayed`, `current` or `blockwise`
scaling (a GPU's alone). `ratio` is the median time of the row --against over the row's own,
`model_tflops` counts what the layout had to compute (megatron_vrl/models/flops.py),
`mfu` is that over the card's bfloat16 peak whatever the format, `entropy_change` the relative
distance of the first update's mean entropy from that of the first row."""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vrl.algorithms import token_loss
from megatron_vrl.batching.pack import Answer, Group, MicroBatch
from megatron_vrl.config import Algorithm, Batch, Model, Optimizer, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.flops import micro_batch_flops, update_flops
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.precision import FP8_FORMATS, FP8_RECIPES
from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock, mrope_positions
from megatron_vrl.observe.hardware import peak_bytes, peak_flops, reset_peak
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from megatron_vrl.types import EncodedVideo, Prompt

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=str(ROOT / "configs/models/qwen2.5-vl-3b.json"), help="a config.json"
    )
    parser.add_argument("--frames", type=int, default=16, help="of the video")
    parser.add_argument("--height", type=int, default=392, help="pixels, a multiple of 28")
    parser.add_argument("--width", type=int, default=700, help="pixels, a multiple of 28")
    parser.add_argument("--answer-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--group", type=int, default=8, help="answers to the prompt")
    parser.add_argument(
        "--formats", default="bfloat16", help="of bfloat16," + ",".join(FP8_RECIPES)
    )
    parser.add_argument("--layouts", default="shared,plain", help="of shared,plain")
    parser.add_argument("--against", default="", help="FORMAT/LAYOUT that ratios are of")
    parser.add_argument("--layers", default="megatron", help="megatron or transformer_engine")
    parser.add_argument("--attention", default="auto", help="sdpa, flash or transformer_engine")
    parser.add_argument("--recompute", default="none", help="none, selective or full")
    parser.add_argument("--micro-batch", type=int, default=8192, help="most tokens of one")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    formats = {*arguments.formats.split(",")}
    if unknown := formats - {"bfloat16", *FP8_RECIPES}:
        raise ConfigError(
            f"--formats {','.join(sorted(unknown))}: choose of {', '.join(FP8_FORMATS)}, bfloat16."
        )
    if arguments.layers != "transformer_engine" and formats != {"bfloat16"}:
        raise ConfigError("--formats of FP8 need --layers transformer_engine, on a GPU.")
    arch = read_architecture(arguments.model)
    cfg = Model(
        checkpoint="none",
        layers=arguments.layers,
        attention=arguments.attention,
        recompute=arguments.recompute,
        freeze_vision=True,
        freeze_merger=True,
    )
    mesh = init_mesh(Parallel(), seed=1)
    policy = Policy(arch, cfg, Parallel(), mesh)
    draw_weights(policy)
    policy.start_phase(Optimizer(lr=1e-6), num_steps=10**6)
    whole = group(arch, arguments)
    batches = {
        layout: plan_batches(
            [whole], whole, Batch(tokens=arguments.micro_batch, layout=layout), mesh
        )
        for layout in arguments.layouts.split(",")
    }
    sides = [(f, layout) for layout in batches for f in arguments.formats.split(",")]
    rounds: dict[tuple[str, str], list[Row]] = {side: [] for side in sides}
    for number in range(1 + arguments.rounds):
        for side in sides:
            measured = _once(policy, batches[side[1]], side[0])
            rounds[side].append(measured | {"warm": number > 0})
    close_mesh()
    yield from _rows(rounds, batches, arch, cfg, arguments)


@torch.no_grad()
def draw_weights(policy: Policy) -> None:
    """Normal with deviation 0.02, as Qwen2.5 begins (`initializer_range`); norms are ones."""
    for chunk in policy.chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _once(policy: Policy, batches: list[MicroBatch], number_format: str) -> Row:
    """One update; the number format is read by Megatron's layers at every forward pass."""
    for chunk in policy.chunks:
        chunk.config.fp8 = FP8_FORMATS.get(number_format)
        chunk.config.fp8_recipe = FP8_RECIPES.get(number_format, "delayed")
    device = policy.mesh.device
    reset_peak(device)
    _wait(device)
    began = time.perf_counter()
    loss = partial(token_loss, cfg=Algorithm(kl=0.0))
    update = policy.update(batches, loss, Distribution(), 0)
    _wait(device)
    seconds = time.perf_counter() - began
    assert update.applied, update
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes(device),
        "entropy": update.metrics["actor/entropy"],
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def group(arch: Architecture, arguments: argparse.Namespace) -> Group:
    """Random frames and random words."""
    rng = np.random.default_rng(0)
    steps = arguments.frames // 2
    grid = (steps, arguments.height // arch.vision.patch, arguments.width // arch.vision.patch)
    size = (2 * steps, arguments.height, arguments.width, 3)
    video = EncodedVideo(
        path="random.mp4",
        digest="0" * 32,
        codec="h264",
        duration_s=float(steps),
        frame_indices=np.arange(2 * steps),
        timestamps_s=np.arange(2 * steps) / 2,
        sampled_fps=2.0,
        seconds_per_grid=1.0,
        grid_thw=grid,
        frame_budget=arguments.height * arguments.width,
        frames=rng.integers(0, 256, size, dtype=np.uint8),
    )
    block = VisionBlock.of(video)
    words = lambda count: rng.integers(0, 100_000 % arch.vocab, count)  # noqa: E731
    pads = np.full(block.num_tokens(arch.vision.merge), arch.video_token)
    token_ids = np.concatenate([words(20), [arch.vision_start_token], pads, words(60)])
    prompt = Prompt(
        id="bench",
        visuals=(video,),
        token_ids=token_ids,
        engine_token_ids=(),
        positions=mrope_positions(
            token_ids,
            [arch.video_token, arch.image_token],
            [block],
            merge=arch.vision.merge,
            tokens_per_second=arch.vision.tokens_per_second,
        ),
    )
    count = arguments.answer_tokens
    answers = tuple(
        Answer(
            token_ids=np.asarray(words(count)),
            advantage=float(rng.normal()),
            engine_logprobs=np.full(count, -np.log(arch.vocab), dtype=np.float32),
        )
        for _ in range(arguments.group)
    )
    return Group(prompt=prompt, answers=answers)


def _rows(
    rounds: dict[tuple[str, str], list[Row]],
    batches: dict[str, list[MicroBatch]],
    arch: Architecture,
    cfg: Model,
    arguments: argparse.Namespace,
) -> Iterator[Row]:
    medians = {
        side: statistics.median(row["seconds"] for row in rows if row["warm"])
        for side, rows in rounds.items()
    }
    base = tuple(arguments.against.split("/")) if arguments.against else next(iter(rounds))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = peak_flops(card, "bfloat16")
    for (number_format, layout), rows in rounds.items():
        flops = sum(update_flops(micro_batch_flops(arch, batch), cfg) for batch in batches[layout])
        seconds = medians[number_format, layout]
        first = rounds[next(iter(rounds))][0]["entropy"]
        yield {
            "bench": "update",
            "model": Path(arguments.model).stem,
            "card": card,
            "format": number_format,
            "layout": layout,
            "prompt_tokens": int(batches[layout][0].prompt_length[0]),
            "answers": f"{arguments.group}x{arguments.answer_tokens}",
            "tokens_computed": sum(len(batch.token_ids) for batch in batches[layout]),
            "median_s": seconds,
            "min_s": min(row["seconds"] for row in rows),
            "ratio": medians[base] / seconds,
            "model_tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / peak if peak else None,
            "peak_gib": max(row["peak_bytes"] for row in rows) / 2**30,
            "entropy_change": rows[0]["entropy"] / first - 1,
        }
