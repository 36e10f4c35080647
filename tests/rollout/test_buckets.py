"""Buckets carry tensors unchanged, within their size, and leave nothing behind."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_vrl.rollout.buckets import read_bucket, write_buckets
from megatron_vrl.rollout.checksums import tensor_checksums


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = [(3,), (7, 5), (), (1, 1000), (64, 2), (0,), (2, 3, 4)]
    return {f"t{index}": torch.randn(shape) for index, shape in enumerate(shapes)}


@pytest.mark.parametrize("max_bytes", [1, 600, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tensors, max_bytes, dtype):
    received, sizes = {}, []
    for bucket in write_buckets(tensors.items(), dtype, max_bytes):
        received |= dict(read_bucket(bucket))
        sizes.append((bucket.num_bytes, len(bucket.names)))
    # Compared after the last bucket is closed: views must outlive their bucket's file.
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(received[name], tensor.to(dtype), rtol=0, atol=0)
    assert all(num_bytes <= max_bytes or count == 1 for num_bytes, count in sizes)


def test_whole_model_in_one_bucket_when_it_fits(tensors):
    assert len(list(write_buckets(tensors.items(), torch.float32))) == 1


def test_nothing_stays_open(tensors):
    before = os.listdir("/proc/self/fd")
    for bucket in write_buckets(tensors.items(), torch.float32, 600):
        dict(read_bucket(bucket))
    abandoned = write_buckets(tensors.items(), torch.float32, 600)
    next(abandoned)
    del abandoned
    assert os.listdir("/proc/self/fd") == before


def test_another_process_can_map_a_bucket(tensors):
    for bucket in write_buckets(tensors.items(), torch.float32):
        code = (
            "from megatron_vrl.rollout.buckets import Bucket, read_bucket\n"
            f"print(sum(t.double().sum().item() for _, t in read_bucket({bucket!r})))"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    assert float(result.stdout) == pytest.approx(sum(t.double().sum() for t in tensors.values()))


def test_checksums_see_one_bit_and_not_the_order(tensors):
    checksums = tensor_checksums(tensors.items(), torch.float32)
    assert tensor_checksums(reversed(tensors.items()), torch.float32) == checksums
    changed = dict(tensors, t1=torch.nextafter(tensors["t1"], torch.tensor(9.0)))
    other = tensor_checksums(changed.items(), torch.float32)
    assert {name for name in checksums if checksums[name] != other[name]} == {"t1"}


def test_checksums_use_published_names_and_one_zero():
    zero = {"model.language_model.norm.weight": torch.zeros(2), "model.visual.a": torch.ones(1)}
    other = {"model.norm.weight": -torch.zeros(2), "visual.a": torch.ones(1)}
    assert tensor_checksums(zero.items(), torch.float32) == tensor_checksums(
        other.items(), torch.float32
    )
