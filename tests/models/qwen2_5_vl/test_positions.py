"""M-RoPE positions compared with hand-written values and with a second implementation per token."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock, mrope_positions

PAD, TEXT = 90, 7


def positions(
    ids: list[int], blocks: list[VisionBlock], merge: int = 2, tokens_per_second: float = 2.0
) -> npt.NDArray[np.int64]:
    return mrope_positions(
        np.array(ids), [PAD], blocks, merge=merge, tokens_per_second=tokens_per_second
    )


def test_text_after_a_video_resumes_after_the_largest_position_of_any_axis() -> None:
    ids = [TEXT] * 3 + [PAD] * 8 + [TEXT] * 2
    block = VisionBlock(grid_thw=(2, 4, 4), seconds_per_grid=1.5)  # steps of 3 positions
    assert positions(ids, [block]).tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 6, 6, 6, 6, 7, 8],  # time leads: 6 + 1
        [0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4, 7, 8],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 7, 8],
    ]


def test_a_wide_image_moves_the_text_by_its_width() -> None:
    ids = [PAD] * 4 + [TEXT]
    block = VisionBlock(grid_thw=(1, 2, 8), seconds_per_grid=0.0)
    assert positions(ids, [block])[:, -1].tolist() == [4, 4, 4]


def test_text_alone_counts_up() -> None:
    assert positions([TEXT] * 4, []).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("cells", [3, 5])
def test_vision_tokens_and_pad_tokens_must_agree(cells: int) -> None:
    with pytest.raises(ValueError, match="differ in number"):
        positions([PAD] * cells, [VisionBlock((1, 4, 4), 1.0)])


blocks = st.builds(
    VisionBlock,
    st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8])),
    st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.7]),
)


@given(st.lists(st.tuples(st.integers(0, 4), blocks), max_size=3), st.integers(0, 4))
def test_positions_equal_a_rule_per_token(pairs: list[tuple[int, VisionBlock]], tail: int) -> None:
    ids, wanted, largest = [], [], -1
    for words, block in pairs:
        for _ in range(words):
            largest += 1
            wanted.append([largest] * 3)
        t, h, w = block.grid_thw
        first = largest + 1
        for step in range(t):
            for row in range(h // 2):
                for column in range(w // 2):
                    time = int(step * block.seconds_per_grid * 2.0)
                    wanted.append([first + time, first + row, first + column])
        largest = max(max(cell) for cell in wanted)
        ids += [TEXT] * words + [PAD] * (t * h * w // 4)
    for _ in range(tail):
        largest += 1
        wanted.append([largest] * 3)
    got = positions([*ids, *[TEXT] * tail], [block for _, block in pairs])
    assert got.T.tolist() == wanted
