"""CPU platform: install replaces exactly the attributes in PATCHES, and uninstall restores them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random as mcore_random

from megatron_vrl.parallel import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


@pytest.fixture
def platform() -> Iterator[None]:
    """Installed for this test, and afterwards as it was before."""
    was_there = bool(cpu._originals)
    cpu.install()
    yield
    cpu.uninstall()
    if was_there:
        cpu.install()


def current() -> list[Any]:
    return [getattr(owner, name) for owner, name, _, _ in cpu.PATCHES]


def test_exactly_the_table_is_patched_and_restored(platform: None) -> None:
    replacements = [replacement for _, _, replacement, _ in cpu.PATCHES]
    assert all(a is b for a, b in zip(current(), replacements, strict=True))
    cpu.install()  # harmless
    cpu.uninstall()
    assert not any(a is b for a, b in zip(current(), replacements, strict=True))
    before = current()
    cpu.install()
    cpu.uninstall()
    assert all(a is b for a, b in zip(current(), before, strict=True))


def test_every_row_says_who_needs_it() -> None:
    places = [(id(owner), name) for owner, name, _, _ in cpu.PATCHES]
    assert len(set(places)) == len(places)
    assert all(reason for *_, reason in cpu.PATCHES)


def test_cuda_is_read_as_cpu_and_other_devices_stay(platform: None) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device="meta").device.type == "meta"
    assert torch.ones(2).cuda().device.type == "cpu"
    device: object = torch.cuda.current_device()
    assert device == torch.device("cpu")


def test_only_megatron_sees_the_cuda_spelling_of_a_type(platform: None) -> None:
    called_by_megatron = eval(
        "lambda tensor: tensor.type()", {"__name__": "megatron.core.optimizer"}
    )
    assert called_by_megatron(torch.ones(1)) == "torch.cuda.FloatTensor"
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64


def test_random_states_are_apart_and_go_on(platform: None) -> None:
    tracker = cpu.CpuRngTracker()
    tracker.add("model-parallel-rng", 5)
    torch.manual_seed(1)
    outside = torch.rand(4)
    torch.manual_seed(1)
    halves = []
    for _ in range(2):
        halves.append(torch.rand(2))
        with tracker.fork():
            halves.append(torch.rand(2))
    assert torch.equal(torch.cat(halves[::2]), outside)
    wanted = torch.rand(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(halves[1::2]), wanted)
    with pytest.raises(ValueError, match="already there"):
        tracker.add("another", 5)


def test_recompute_sees_the_cpu_generator(platform: None) -> None:
    torch.manual_seed(3)
    state = mcore_random._get_cuda_rng_state()
    first = torch.rand(3)
    mcore_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_meta_models_stay_without_memory(platform: None) -> None:
    with torch.device("meta"):
        made = [torch.empty(3), torch.zeros(3), torch.ones(3), torch.nn.Linear(4, 4).weight]
    assert all(tensor.is_meta for tensor in made)
