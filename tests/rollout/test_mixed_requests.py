"""Requests with videos, images or text alone: the message to workers, and vLLM's prompt."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_vrl.models.families import FAMILIES, family_named
from megatron_vrl.rollout.request import SamplingSpec, make_request, vllm_prompt
from megatron_vrl.rollout.workers.protocol import GenerateRequest, decode, encode
from megatron_vrl.types import Visual
from tests.tiny import image, prompt, video

VISUALS: list[Visual] = [
    image((4, 2), 1),
    video((2, 2, 4), 1.0, 2),
    image((2, 2), 3),
    video((1, 2, 2), 1.0, 4),
]
MADE = prompt(VISUALS, 0)
MIXED = replace(MADE, engine_token_ids=tuple(map(int, MADE.engine_token_ids)))


@pytest.mark.parametrize("embedded", [False, True])
def test_blocks_of_both_kinds_reach_a_worker_in_order(embedded: bool) -> None:
    tokens = [np.full((v.grid_thw[0], 8), i, np.float32) for i, v in enumerate(VISUALS)]
    asked = replace(MIXED, visual_embeds=tuple(tokens)) if embedded else MIXED
    sent = GenerateRequest(request=make_request(asked), spec=SamplingSpec.greedy(4), version=0)
    found = decode(encode(sent), GenerateRequest).request
    assert [block.kind for block in found.visuals] == ["image", "video", "image", "video"]
    for index, (block, visual) in enumerate(zip(found.visuals, VISUALS, strict=True)):
        assert block.grid_thw == visual.grid_thw
        if embedded:
            assert block.frames.size == 0 and block.embeddings is not None
            assert np.array_equal(block.embeddings, tokens[index])
        else:
            wanted = visual.frames[:1] if block.kind == "image" else visual.frames
            assert block.embeddings is None and np.array_equal(block.frames, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_gets_each_kind_in_order_with_names(family: str) -> None:
    inputs = family_named(family).engine
    made = vllm_prompt(make_request(MIXED), inputs, "7")
    pictures, clips = made["multi_modal_data"]["image"], made["multi_modal_data"]["video"]
    for picture, visual in zip(pictures, VISUALS[::2], strict=True):
        assert picture.ndim == 3 and np.array_equal(picture, visual.frames[0])
    for (frames, _), visual in zip(clips, VISUALS[1::2], strict=True):
        assert np.array_equal(frames, visual.frames)
    names = made["multi_modal_uuids"]
    assert len({*names["image"], *names["video"]}) == 4
    assert all(name.endswith("-7") for name in (*names["image"], *names["video"]))
    tokens = tuple(np.zeros((1, 8), np.float32) for _ in VISUALS)
    made = vllm_prompt(make_request(replace(MIXED, visual_embeds=tokens)), inputs, "")
    assert made["multi_modal_data"]["image"]["image_embeds"].shape == (2, 8)
    assert made["multi_modal_data"]["image"]["image_grid_thw"].tolist() == [[1, 4, 2], [1, 2, 2]]


def test_text_alone_has_no_media() -> None:
    inputs = family_named(FAMILIES[0]).engine
    assert set(vllm_prompt(make_request(prompt([], 0)), inputs, "")) == {"prompt_token_ids"}
