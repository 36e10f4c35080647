"""Parts of a checkpoint's tensors that one rank writes or reads, without a gathered copy.

A checkpoint stores a parameter, and each tensor of its optimizer state, as one tensor of the whole
model. A rank holds a range of the flat elements of its tensor-parallel part. Such a range is at
most 2d - 1 rectangular blocks of a d-dimensional tensor, and torch's checkpoint format stores any
set of blocks that covers a tensor once. So every rank writes the elements that it holds, as views,
and reads the elements that it needs into their place.

A save from a GPU copies each block to pinned host memory, which torch rounds up to a power of two.
Blocks of at most BLOCK_BYTES lose at most 6 % of it, whole tensors of the 3B model 46 %.

Example: elements 5 to 17 of a tensor of shape [6, 4] are row 1 from column 1, rows 2 and 3, and
row 4 up to column 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

BLOCK_BYTES = 16 * 2**20  # largest block that is written; a reader reads whole blocks

Block = tuple[int, tuple[int, ...], tuple[int, ...]]  # first flat element, offsets, sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Contiguous elements of a rank's parameter that are one rectangle of a stored tensor.

    A parameter is one region, or two if it holds gate and up projection of an MLP.
    """

    key: str  # name of the stored tensor
    start: int  # first element in the flat parameter
    shape: tuple[int, ...]
    offset: tuple[int, ...]  # of the rectangle in the stored tensor
    global_shape: tuple[int, ...]
    padded: bool  # a vocabulary, whose padding depends on the layout
    replica: tuple[int, int]  # pipeline and tensor replica; the first is (0, 0)


def regions_of(entry: ShardedTensor | ShardedTensorFactory) -> list[Region]:
    """Return the regions of one parameter, from its entry in a sharded state dict."""
    built = [entry] if isinstance(entry, ShardedTensor) else entry.build()
    first = entry.data.storage_offset()
    for tensor in built:
        assert tensor.prepend_axis_num == 0 and tensor.data.is_contiguous(), tensor.key
    return [
        Region(
            key=tensor.key,
            start=tensor.data.storage_offset() - first,
            shape=tuple(tensor.local_shape),
            offset=tuple(tensor.global_offset),
            global_shape=tuple(tensor.global_shape),
            padded=tensor.allow_shape_mismatch,
            replica=tuple(tensor.replica_id[:2]),
        )
        for tensor in built
    ]


def sharded(
    regions: Sequence[Region], flat: Tensor, start: int, prefix: str = "", block_bytes: int = 0
) -> Iterator[ShardedTensor]:
    """Yield elements of a parameter as tensors of a sharded state dict, which are views of `flat`.

    `flat` [elements] holds the elements of the parameter, or of a state of its shape, from `start`
    on. `prefix` goes before the key. `block_bytes`: largest block; 0: no limit.
    """
    for region in regions:
        low = max(start, region.start)
        high = min(start + len(flat), region.start + prod(region.shape))
        most = block_bytes // flat.element_size()
        for first, offsets, sizes in blocks(
            region.shape, low - region.start, high - region.start, most
        ):
            begin = region.start + first - start
            yield ShardedTensor(
                key=prefix + region.key,
                data=_alone(flat[begin : begin + prod(sizes)]).view(sizes),
                dtype=flat.dtype,
                local_shape=sizes,
                global_shape=region.global_shape,
                global_offset=tuple(map(sum, zip(region.offset, offsets, strict=True))),
                axis_fragmentations=None,  # blocks are no regular grid
                allow_shape_mismatch=region.padded,
            )


def _alone(flat: Tensor) -> Tensor:
    """Return the elements as a tensor whose storage ends with them, on the same memory.

    Megatron's writer copies a CPU tensor whose storage is larger, since torch.save writes storages.
    """
    if flat.device.type != "cpu":
        return flat
    return torch.from_numpy(flat.detach().view(torch.uint8).numpy()).view(flat.dtype)


def blocks(shape: Sequence[int], low: int, high: int, most: int = 0) -> Iterator[Block]:
    """Yield the blocks that hold the flat elements [low, high) of a row-major tensor, in order.

    `most`: largest number of elements of a block of whole rows; 0: no limit.
    """
    if low >= high:
        return
    row = prod(shape[1:])
    first, last = -(-low // row), high // row  # rows first to last - 1 are whole
    if low < first * row:
        yield from _inside(shape, first - 1, low, min(high, first * row), most)
    step = max(1, most // row) if most else max(1, last - first)
    for at in range(first, last, step):
        size = min(step, last - at)
        yield at * row, (at, *[0] * (len(shape) - 1)), (size, *shape[1:])
    if first <= last and last * row < high:
        yield from _inside(shape, last, last * row, high, most)


def _inside(shape: Sequence[int], at: int, low: int, high: int, most: int) -> Iterator[Block]:
    """Yield the blocks of elements that are all in row `at`."""
    begin = at * prod(shape[1:])
    for first, offsets, sizes in blocks(shape[1:], low - begin, high - begin, most):
        yield begin + first, (at, *offsets), (1, *sizes)


def shard_ranges(sizes: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """Return the range (low, high) of each tensor that is this rank's share.

    `ranks` ranks hold equal tensors of `sizes` elements. The tensors, one after another, are cut
    into one part a rank. Example: sizes [6, 2] over two ranks give rank 0 [(0, 4), (0, 0)] and
    rank 1 [(4, 6), (0, 2)].
    """
    total = sum(sizes)
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    shares: list[tuple[int, int]] = []
    position = 0
    for size in sizes:
        begin = min(max(low - position, 0), size)
        shares.append((begin, max(begin, min(high - position, size))))
        position += size
    return shares
