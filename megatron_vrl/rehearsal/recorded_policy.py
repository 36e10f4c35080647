"""Policy of a rehearsal, which tells the recorder what an operation belongs to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.policy.policy import Policy
from megatron_vrl.rehearsal.recorder import Recorder


class RecordedPolicy(Policy):
    """Policy whose passes must not read from the GPU. `recorder` is set before the first pass."""

    recorder: Recorder

    def _run(
        self, chunks: Any, jobs: Any, of: Distribution, forward_only: bool = False
    ) -> list[Any]:
        """Override: a forward pass before the update is a phase, which the caller has entered."""
        followed = [] if forward_only else self.chunks
        with _phases(followed, self.recorder), self.recorder.passes():
            records = super()._run(chunks, jobs, of, forward_only)
        self.recorder.enter("step")
        return records

    def _reduce(self, records: list[dict[str, Tensor]]) -> dict[str, float]:
        """Override: a stage that is not the last gets the names of metrics from no other stage,
        so it reduces the two that every update has."""
        zero = torch.zeros((), device=self.mesh.device)
        return super()._reduce(records or [{"loss": zero, "tokens": zero}])


@contextmanager
def _phases(chunks: list[VisionLanguageModel], recorder: Recorder) -> Iterator[None]:
    """Tell the recorder, in this block, which phase and layer an operation belongs to.

    The backward pass of layers begins with the gradient of the last one's output, and ends with
    that of the first one's input.
    """
    hooks = []
    for chunk in chunks:
        hooks.append(chunk.register_forward_pre_hook(lambda *_: recorder.enter("forward")))
        hooks.append(chunk.register_forward_hook(lambda *_: recorder.enter("backward")))
        layers = {"language layers": list(chunk.language.decoder.layers)}
        if chunk.vision is not None:
            layers["vision layers"] = chunk.vision.layers()
        for part, modules in layers.items():
            for layer in modules:
                begins = _begins(recorder, part, first=layer is modules[0])
                hooks.append(layer.register_forward_pre_hook(begins, with_kwargs=True))
                hooks.append(layer.register_forward_hook(_ends(recorder, part)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _begins(recorder: Recorder, part: str, *, first: bool) -> Any:
    def begin(module: Any, args: Any, kwargs: Any) -> None:
        if first:
            _switch(recorder, args[0] if args else kwargs["hidden_states"], "rest")
        recorder.part = part

    return begin


def _ends(recorder: Recorder, part: str) -> Any:
    def end(module: Any, args: Any, out: Any) -> None:
        _switch(recorder, out[0] if isinstance(out, tuple) else out, part)
        recorder.part = "rest"

    return end


def _switch(recorder: Recorder, tensor: Tensor, part: str) -> None:
    """Set the part when the gradient of `tensor` is there."""
    if tensor.requires_grad:
        tensor.register_hook(lambda _: setattr(recorder, "part", part))
