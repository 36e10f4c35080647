"""PromptDataLoader on any number of ranks, with files missing, against the rule in five lines.

The folder holds 0.mp4, 1.mp4, ... of which those in BAD are bad.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from transformers import AutoTokenizer

from megatron_vrl.config import Data, Parallel, Video
from megatron_vrl.context import RunContext
from megatron_vrl.data.mix import SampleStream
from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.data.prompt_pipeline import PromptPipeline
from megatron_vrl.errors import UserError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.parallel.mesh import (
    Mesh,
    close_mesh,
    gather_objects,
    gather_shards,
    init_mesh,
    world_axis,
)
from megatron_vrl.storage.files import read_rows
from megatron_vrl.trainer.dataloader import PromptDataLoader
from megatron_vrl.trainer.state import RunState
from megatron_vrl.types import MEDIA_PLACE, ImageFile, Sample, VideoClip
from megatron_vrl.video import VideoReader

ARCHITECTURE = read_architecture(
    Path(__file__).parents[2] / "configs" / "models" / "qwen2.5-vl-3b.json"
)

NUM_FILES, BAD, STEPS, BATCH, SEED = 20, {1, 4, 5, 13}, 6, 5, 3
BAD_IMAGE, WITH_IMAGE, TEXT = 5, (5, 6), 7


def samples(folder: Path) -> list[Sample]:
    """Return samples with one video; two have an image beside it, and one is text alone."""
    return [sample(number, folder) for number in range(NUM_FILES)]


def sample(number: int, folder: Path) -> Sample:
    made = Sample(
        id=f"s{number}",
        task="temporal_grounding",
        media=(VideoClip(str(folder / f"{number}.mp4"), folder=str(folder)),),
        duration_s=1.0,
        query="the red square is visible",
        rationale="",
        intervals_s=((0.0, 0.5),),
        options=(),
        option="",
    )
    choice = replace(made, task="multiple_choice", options=("red", "blue"), option="A")
    if number == TEXT:
        return replace(choice, media=())
    if number in WITH_IMAGE:
        image = ImageFile(str(folder / f"{number}.png"), str(folder))
        query = f"Is {MEDIA_PLACE} in {MEDIA_PLACE}?"
        return replace(choice, media=(image, *made.media), query=query)
    return made


def expected(folder: Path) -> list[list[str]]:
    """Sample ids of each step by the rule: bad ones make room for the next of the stream."""
    stream, steps = SampleStream(samples(folder), SEED), []
    for _ in range(STEPS):
        batch = stream.take(BATCH)
        while bad := [i for i, s in enumerate(batch) if int(s.id[1:]) in BAD]:
            for place, sample in zip(bad, stream.take(len(bad)), strict=True):
                batch[place] = sample
        steps.append([sample.id for sample in batch])
    return steps


def ctx_of(mesh: Mesh, folder: Path, published: Path, max_bad_fraction: float) -> RunContext:
    tokenizer = AutoTokenizer.from_pretrained(published)
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert isinstance(pad, int) and isinstance(image, int)
    arch = replace(ARCHITECTURE, video_token=pad, image_token=image)
    video = Video(
        decoder="pyav",
        num_frames=2,
        min_pixels=784,
        max_pixels=784,
        max_bad_fraction=max_bad_fraction,
    )
    reader = VideoReader(video, PIXELS)
    made = SimpleNamespace(
        mesh=mesh,
        cfg=SimpleNamespace(
            run=SimpleNamespace(out_dir=str(folder)), video=video, data=Data(snap_truth=True)
        ),
        reader=reader,
        prompts=PromptPipeline(reader, PromptEncoder(published, arch, "none", 4096)),
    )
    return cast(RunContext, made)


def draw_steps(ctx: RunContext, folder: Path, state: RunState, steps: int) -> list[list[str]]:
    """Ids of all ranks' samples for each step, as one list in the order of the stream."""
    stream = SampleStream(samples(folder), SEED)
    stream.restore(state.stream)
    messages: list[str] = []
    dataloader = PromptDataLoader(ctx, stream, state, messages.append)
    ids = []
    for _ in range(steps):
        made = dataloader.take(BATCH)
        for sample, prompt, _ in made:
            shown = [visual.path for visual in prompt.visuals]
            assert shown == [medium.path for medium in sample.media]
            assert all(len(visual.frames) == 2 for visual in prompt.visuals)
            # one temporal step: the truth keeps its times
            assert sample.intervals_s == ((0.0, 0.5),)
        dataloader.prefetch(BATCH)
        mine = [one.sample.id for one in made]
        ids.append(gather_shards(mine, ctx.mesh.data))
        state.step, state.stream = state.step + 1, dataloader.position
    own = [one.position for one in made]
    state.in_flight = gather_shards(own, ctx.mesh.data)  # asked and not answered
    metrics = dataloader.metrics()
    assert (
        metrics["data/bad_samples"] == len(dataloader._bad) and metrics["data/videos_decoded"] >= 1
    )
    return ids


def check(folder: Path, published: Path) -> None:
    mesh = init_mesh(Parallel(), seed=1)
    ctx = ctx_of(mesh, folder, published, max_bad_fraction=0.5)
    want = expected(folder)
    undisturbed = RunState(stage="grpo")
    assert draw_steps(ctx, folder, undisturbed, STEPS) == want
    bad_at_once = undisturbed.bad_samples
    rows = read_rows(folder / "quarantine.jsonl")
    gather_objects(world_axis(mesh), None)  # all have read it before it is begun anew
    assert {int(row["sample"][1:]) for row in rows} == BAD and len(rows) == len(BAD)
    assert {row["kind"] for row in rows} == {"missing", "empty", "outside"}
    assert str(folder / f"{BAD_IMAGE}.png") in {row["video"] for row in rows}

    state = RunState(stage="grpo")  # stopped after two steps and started again
    first = draw_steps(ctx, folder, state, 2)
    again = ctx_of(mesh, folder, published, max_bad_fraction=0.5)
    state.in_flight = []
    assert first + draw_steps(again, folder, state, STEPS - 2) == want
    assert state.bad_samples == bad_at_once  # counted on, not anew
    state.step -= 1
    assert draw_steps(again, folder, state, 1) == want[-1:]
    kept = read_rows(folder / "quarantine.jsonl")
    gather_objects(world_axis(mesh), None)
    assert [(r["sample"], r["step"]) for r in kept] == [(r["sample"], r["step"]) for r in rows]

    strict = ctx_of(mesh, folder, published, max_bad_fraction=0.02)
    with pytest.raises(UserError) as error:
        draw_steps(strict, folder, RunState(stage="grpo"), STEPS)
    assert "samples drawn have bad videos, over video.max_bad_fraction=0.02: " in str(error.value)
    assert "missing (first " in str(error.value) or "empty (first " in str(error.value)
    gather_objects(world_axis(mesh), None)  # all ranks are still in step
    close_mesh()
