"""Parts of Qwen3-VL alone: rotary pairs, learned positions, DeepStack on pipeline stages, FLOPs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.flops import group_flops
from megatron_vrl.models.pipeline_split import check_divides
from megatron_vrl.models.qwen3_vl.pixels import PIXELS
from megatron_vrl.models.qwen3_vl.rotary import axis_of_pairs
from megatron_vrl.models.qwen3_vl.vision_inputs import learned_positions
from tests.models.against_hf import groups_of, seen_by_transformers, token_types
from tests.running import ROOT
from tests.tiny_models import qwen3_model
from tests.tiny_qwen3_vl import ARCH, prompt, video


def test_axes_take_turns_and_the_rest_is_time() -> None:
    axes = axis_of_pairs((24, 20, 20))  # of the released models
    assert axes[:6] == [0, 1, 2, 0, 1, 2] and axes[60:] == [0] * 4
    assert [axes.count(axis) for axis in range(3)] == [24, 20, 20]


@pytest.mark.parametrize("size", [(2, 2), (4, 10), (14, 6)])
def test_learned_positions_are_bilinear_with_aligned_corners(size: tuple[int, int]) -> None:
    table = torch.randn(25, 3, dtype=torch.float64)
    cells, weights, place = learned_positions([size, size], ARCH.vision)
    got = (table[torch.from_numpy(cells)] * torch.from_numpy(weights)[:, :, None]).sum(1)[place]
    grid = table.view(1, 5, 5, 3).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size, mode="bilinear", align_corners=True)[0]  # [3, h, w]
    h, w = (side // 2 for side in size)
    merged = wanted.view(3, h, 2, w, 2).permute(1, 3, 2, 4, 0).reshape(-1, 3)
    torch.testing.assert_close(got, merged.repeat(2, 1), rtol=0, atol=1e-6)
    assert len(cells) == len(place) // 2  # equal steps share their places


@pytest.mark.parametrize(
    "cfg", [{"pipeline": 3}, {"pipeline": 2, "layers_per_chunk": [2, 4]}, {"virtual": 3}]
)
def test_deepstack_layers_are_on_the_first_stage(cfg: dict[str, Any]) -> None:
    cfg = {"pipeline": 2} | cfg
    with pytest.raises(ConfigError, match=r"first pipeline stage gets [12] of"):
        check_divides(ARCH, Model(checkpoint=""), Parallel(**cfg))
    check_divides(ARCH, Model(checkpoint=""), Parallel(pipeline=2))


def test_released_sizes_are_read() -> None:
    arch = read_architecture(ROOT / "configs" / "models" / "qwen3-vl-4b.json")
    assert (arch.heads * arch.head_dim, arch.hidden) == (4096, 2560)
    assert arch.qk_norm and not arch.qkv_bias and arch.tied_head
    assert (arch.vision_width, arch.vision.position_grid) == (4 * 2560, 48)


def test_flops_equal_torchs_count() -> None:
    model, asked = qwen3_model(), prompt([video((2, 4, 6), 1.0, 1), video((1, 8, 2), 1.5, 2)], 1)
    (group,) = groups_of([asked], [1])  # an answer of one token: no input of its own
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            input_ids=torch.from_numpy(asked.token_ids)[None],
            mm_token_type_ids=token_types(asked.token_ids),
            **seen_by_transformers(asked, PIXELS),
        )
    counts, work = counter.get_flop_counts(), group_flops(ARCH, group)

    def spent(module: str, attention: bool | None = None) -> int:
        """FLOPs of a module, or of the members of a list: of batched products, or of others."""
        found = [item for n, by in counts.items() if _is(n, module) for item in by.items()]
        kinds = [(str(operation) == "aten.bmm", flops) for operation, flops in found]
        return sum(flops for kind, flops in kinds if attention in (None, kind))

    length = len(asked.token_ids)
    assert work.linear == spent("language_model.layers", attention=False)
    square = spent("language_model.layers", attention=True)  # not causal
    assert work.attention == square * (length + 1) / (2 * length)
    assert work.head == spent("lm_head") / length
    assert work.merger == spent("visual.merger") + spent("visual.deepstack_merger_list")
    assert work.vision == spent("visual.blocks") + spent("visual.patch_embed")


def _is(name: str, module: str) -> bool:
    """Return whether `name` is the module, or a member of a list of modules."""
    parent, _, last = name.rpartition(".")
    return name.endswith("." + module) or (parent.endswith("." + module) and last.isdigit())
