"""Rotation by shared tables: to the bit what Megatron computes, gradients and fused kernel too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_vrl.models import rotary
from megatron_vrl.models.rotary import rotary_tables, rotate

ROWS, KEY_HEADS, QUERY_HEADS, CHANNELS = 5, 2, 3, 8


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    mixed = torch.randn(ROWS, 1, KEY_HEADS * (QUERY_HEADS + 2) * CHANNELS, generator=noise)
    half = 9 * torch.randn(ROWS, 1, 1, CHANNELS // 2, generator=noise)
    return mixed, torch.cat([half, half], dim=-1)


def rotated(
    mixed: Tensor, angles: Tensor, rotate: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Result and gradient of a loss that weighs every value differently."""
    leaf = mixed.detach().clone().requires_grad_()
    out = rotate(leaf * 1, angles)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()).sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def ours(mixed: Tensor, angles: Tensor) -> Tensor:
    return rotate(mixed, rotary_tables(angles, mixed.dtype), KEY_HEADS)


def megatrons(mixed: Tensor, angles: Tensor) -> Tensor:
    heads = mixed.view(ROWS, KEY_HEADS, -1, CHANNELS)
    turned = _apply_rotary_pos_emb_bshd(heads[:, :, :-1], angles)
    return torch.cat([turned, heads[:, :, -1:]], dim=2).view_as(mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_megatrons_to_the_bit_and_its_gradient_is_no_less_exact(
    drawn: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    mixed, angles = drawn
    (got, slope), (wanted, expected) = (
        rotated(mixed.to(dtype), angles, rotate) for rotate in (ours, megatrons)
    )
    assert torch.equal(got, wanted)
    exact = rotated(mixed.double(), angles.double(), megatrons)[1]
    assert (slope - exact).norm() <= (expected - exact).norm()  # it rounds once less


class ViewOfResult(torch.autograd.Function):
    """Linear layers of Transformer Engine 2.20.2 return such a view, which no `mark_dirty` allows
    to change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 1).flatten().view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_a_view_of_an_autograd_function_is_rotated_in_place(drawn: tuple[Tensor, Tensor]) -> None:
    places = []

    def of_view(leaf: Tensor, angles: Tensor) -> Tensor:
        view: Tensor = ViewOfResult.apply(leaf)
        out = ours(view, angles)
        places.append((view.data_ptr(), out.data_ptr()))
        return out

    for got, expected in zip(rotated(*drawn, of_view), rotated(*drawn, ours), strict=True):
        assert torch.equal(got, expected)
    assert places[0][0] == places[0][1]


def test_a_backward_pass_that_needs_what_was_rotated_says_so(drawn: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated(*drawn, lambda leaf, angles: ours(leaf.exp(), angles))


def test_a_fused_kernel_gets_angles_and_their_inverse(
    drawn: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of Transformer Engine, by Megatron's own rotation: same arguments, same result."""
    wanted = rotated(*drawn, ours)
    monkeypatch.setattr(rotary, "fused_rotation", lambda: _apply_rotary_pos_emb_bshd)
    tables = rotary_tables(drawn[1], torch.bfloat16)
    assert tables.dtype == torch.float32 and torch.equal(tables[0], drawn[1])
    for got, expected in zip(rotated(*drawn, ours), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
