"""One side of `bench.py head`: `head_side.py chunked|naive TOKENS VOCAB HIDDEN`."""

import sys

import torch
from torch import Tensor

from benches.worker import resident, serve
from megatron_vrl.config import Parallel
from megatron_vrl.models.logprob_head import Distribution, token_logprobs
from megatron_vrl.observe.silence_logs import silence_libraries
from megatron_vrl.parallel.mesh import init_mesh


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.t()).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, target[:, None])[:, 0], entropy


def main(side: str, tokens: int, vocab: int, channels: int) -> None:
    silence_libraries()
    torch.set_num_threads(1)
    mesh = init_mesh(Parallel(), seed=1)
    on = mesh.device
    hidden = torch.randn(tokens, channels, device=on).requires_grad_()
    weight = (torch.randn(vocab, channels, device=on) / channels**0.5).requires_grad_()
    target = torch.randint(vocab, (tokens,), device=on)

    def once() -> None:
        hidden.grad = weight.grad = None
        if side == "naive":
            logprob, entropy = naive(hidden, weight, target)
        else:
            logprob, entropy = token_logprobs(
                hidden, weight, target, group=mesh.tensor.group, distribution=Distribution()
            )
        (logprob.sum() + 1e-3 * entropy.sum()).backward()

    gradients = 4 * (hidden.numel() + weight.numel())
    held = torch.cuda.memory_allocated() if on.type == "cuda" else resident()
    serve(once, held_before=held + gradients, fixed={}, on_gpu=on.type == "cuda")


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    main(name, *map(int, sizes))
