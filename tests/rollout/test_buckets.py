"""Buckets keep tensors unchanged in this process, in another one and over a network."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.buckets import BucketReader, BucketWriter
from megatron_vrl.rollout.checksums import tensor_checksums
from megatron_vrl.rollout.workers.protocol import encode


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(3,), (7, 5), (), (1, 1000), (64, 2), (0,), (2, 3, 4)]
    return {f"t{index}": torch.randn(shape) for index, shape in enumerate(shapes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    writer, reader = BucketWriter(dtype), BucketReader()
    for part in (list(tensors.items())[:3], list(tensors.items())[3:], list(tensors.items())):
        received = dict(reader.read(writer.write(part)))
        assert list(received) == [name for name, _ in part]
        for name, tensor in part:
            torch.testing.assert_close(received[name], tensor.to(dtype), rtol=0, atol=0)


def test_a_bucket_sent_as_bytes_keeps_its_tensors(tensors: dict[str, torch.Tensor]) -> None:
    writer = BucketWriter(torch.float32)
    bucket = writer.write(tensors.items())
    inbox = BucketWriter(torch.float32)
    here = inbox.reserve(bucket)
    inbox.contents(here)[:] = writer.contents(bucket)
    for read in (dict(inbox.tensors(here)), dict(BucketReader().read(here))):
        for name, tensor in tensors.items():
            torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


def test_memory_is_allocated_once(tensors: dict[str, torch.Tensor]) -> None:
    writer, before = BucketWriter(torch.float32), os.listdir("/proc/self/fd")
    buckets = [writer.write(tensors.items()) for _ in range(3)]
    assert len({(bucket.memory, bucket.memory_bytes) for bucket in buckets}) == 1
    assert os.listdir("/proc/self/fd") == before
    writer.close()
    assert len(os.listdir("/proc/self/fd")) == len(before) - 1


def test_other_files_are_not_mapped(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    secret = tmp_path / "file"
    secret.write_bytes(bytes(1 << 16))
    bucket = BucketWriter(torch.float32).write(tensors.items())
    with pytest.raises(RolloutError, match="file is not the memory of a process"):
        dict(BucketReader().read(replace(bucket, path=str(secret))))


def test_checksums_depend_on_every_bit_and_not_on_the_order(
    tensors: dict[str, torch.Tensor],
) -> None:
    checksums = tensor_checksums(tensors.items(), torch.float32)
    assert tensor_checksums(reversed(tensors.items()), torch.float32) == checksums
    changed = dict(tensors, t1=torch.nextafter(tensors["t1"], torch.tensor(9.0)))
    other = tensor_checksums(changed.items(), torch.float32)
    assert {name for name in checksums if checksums[name] != other[name]} == {"t1"}


def test_checksums_ignore_the_sign_of_zero() -> None:
    zero = {"model.norm.weight": torch.zeros(2), "visual.a": torch.ones(1)}
    other = {"model.norm.weight": -torch.zeros(2), "visual.a": torch.ones(1)}
    assert tensor_checksums(zero.items(), torch.float32) == tensor_checksums(
        other.items(), torch.float32
    )


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_another_process_opens_the_memory_of_buckets_once(
    tensors: dict[str, torch.Tensor], gpu: bool
) -> None:
    """Shared memory, and CUDA IPC on a GPU: the reader reads the next bucket in what it opened."""
    device = torch.device("cuda", 0) if gpu else None
    writer, codec = BucketWriter(torch.bfloat16, device), "megatron_vrl.rollout"
    code = (
        "import sys\n"
        f"from {codec}.buckets import WeightBucket, BucketReader\n"
        f"from {codec}.workers.protocol import decode\n"
        "reader = BucketReader()\n"
        "for line in sys.stdin:\n"
        "    bucket = decode(bytes.fromhex(line), WeightBucket)\n"
        "    total = sum(t.double().sum().item() for _, t in reader.read(bucket))\n"
        "    print(total, len(reader._open), flush=True)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None and reader.stdout is not None
    for factor in (1, 2):
        scaled = {name: (tensor * factor).bfloat16() for name, tensor in tensors.items()}
        bucket = writer.write(scaled.items())
        assert dict(writer.tensors(bucket))["t1"].equal(scaled["t1"].to(device or "cpu"))
        reader.stdin.write(encode(bucket).hex() + "\n")
        reader.stdin.flush()
        total, opened = reader.stdout.readline().split()
        assert float(total) == pytest.approx(sum(t.double().sum() for t in scaled.values()))
        assert opened == "1"
    reader.stdin.close()
    assert reader.wait() == 0
