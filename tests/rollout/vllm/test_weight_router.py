"""Routes recorded from a loader like vLLM's, which copies by name into merged matrices."""

from collections.abc import Iterable, Iterator

import torch

from megatron_vrl.rollout.vllm.weight_router import WeightRouter
from tests.rollout.conftest import Weights


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.merged = torch.nn.Parameter(torch.zeros(6, 3))
        self.embedding = torch.nn.Parameter(torch.zeros(8, 3))
        self.scale = torch.nn.Parameter(torch.zeros(4))
        self.seen: list[str] = []

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        filled = set()
        for name, tensor in tensors:
            self.seen.append(name)
            if name in ("q", "k"):
                half = self.merged.data.narrow(0, 3 * (name == "k"), 3)
                half.copy_(tensor)
                filled.add("merged")
            elif name == "embedding":  # this process's half of the rows, padded
                self.embedding[:5].data.copy_(tensor.narrow(0, 5, 5))
                self.embedding[5:].data.fill_(0)
                filled.add("embedding")
            elif name == "scale":
                self.scale.data.copy_(tensor.abs())
                filled.add("scale")
        return filled


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (3, 3), "tied": (8, 3), "embedding": (10, 3), "k": (3, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def as_loaded(weights: Weights) -> dict[str, torch.Tensor]:
    plain = Model()
    plain.load_weights(weights.items())
    return {name: parameter.clone() for name, parameter in plain.named_parameters()}


def assert_equal(model: Model, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_second_sync_repeats_the_copies_without_the_loader() -> None:
    model = Model()
    router = WeightRouter(model)
    assert router.load_weights(tensors(1).items()) == {"merged", "embedding"}
    assert model.seen == [*tensors(1)]
    # A bucket in another order and in one piece of memory, as a generator yields it.
    changed = tensors(2)
    flat = torch.cat([tensor.flatten() for tensor in changed.values()])
    parts = flat.split([tensor.numel() for tensor in changed.values()])
    bucket = [
        (name, part.view(tensor.shape))
        for (name, tensor), part in zip(changed.items(), parts, strict=True)
    ]
    assert router.load_weights(reversed(bucket)) == {"merged", "embedding"}
    assert model.seen == [*tensors(1)]
    assert_equal(model, as_loaded(changed))


def test_producing_the_next_tensor_is_not_recorded() -> None:
    model = Model()
    router = WeightRouter(model)

    def made(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        both = torch.cat([tensors(seed)["q"], tensors(seed)["k"]])
        yield "q", both[:3]
        yield "k", both.clone()[3:]  # reads what "q" is a part of

    for seed in (1, 2):
        router.load_weights(made(seed))
    assert model.seen == ["q", "k"]
    assert torch.equal(model.merged, torch.cat([tensors(2)["q"], tensors(2)["k"]]))


def test_a_tensor_that_the_loader_computes_with_always_goes_through_it() -> None:
    model = Model()
    router = WeightRouter(model)
    for sign in (1, -1):
        weights = {"q": sign * torch.ones(3, 3), "scale": sign * torch.ones(4)}
        assert router.load_weights(weights.items()) == {"merged", "scale"}
        assert_equal(model, as_loaded(weights))
    assert model.seen == ["q", "scale", "scale"]


def test_other_strides_are_recorded_again() -> None:
    model = Model()
    router = WeightRouter(model)
    router.load_weights(tensors(1).items())
    turned = tensors(2) | {"k": tensors(2)["k"].t().contiguous().t()}
    router.load_weights(turned.items())
    assert model.seen == [*tensors(1), "k"]
    assert_equal(model, as_loaded(turned))


def test_moved_parameters_invalidate_the_router() -> None:
    model = Model()
    router = WeightRouter(model)
    assert router.is_valid()
    model.scale.data = torch.zeros(4)
    assert not router.is_valid()
