"""The counter sees operations, their bytes, every kind of host read, and uploads."""

from collections.abc import Callable

import numpy as np
import torch

from megatron_vrl.observe.op_counter import OpCounter


def test_operations_and_bytes_without_views() -> None:
    values = torch.ones(4, 8)
    with OpCounter() as counter:
        product = values.t()[2:] @ values
        torch.empty(100)
    assert counter.operations == {"mm": 1} and counter.total == 1
    assert counter.bytes_moved == 4 * (6 * 4 + 4 * 8 + 6 * 8)
    assert not counter.host_reads and product.shape == (6, 8)


def test_a_backward_pass_counts() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    with OpCounter() as counter:
        (weight @ weight).sum().backward()
    assert counter.operations["mm"] == 3


def test_every_kind_of_host_read() -> None:
    values = torch.arange(4.0)
    reads: list[Callable[[], object]] = [
        lambda: values.sum().item(),
        lambda: float(values[1]),
        lambda: bool(values[0] == 0),
        lambda: values.tolist(),
        lambda: values.numpy(),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: torch.equal(values, values),
    ]
    for read in reads:
        with OpCounter() as counter:
            read()
        assert sum(counter.host_reads.values()) == 1, counter.host_reads
        assert "test_op_counter.py" in next(iter(counter.host_reads))


def test_uploads_and_nothing_after_the_block() -> None:
    outside = torch.from_numpy
    with OpCounter() as counter:
        torch.from_numpy(np.arange(3))
        torch.tensor([1, 2])
    assert sum(counter.uploads.values()) == 2
    assert torch.from_numpy is outside
