"""One process: the update does not depend on how the batch is cut, on the number format's
rounding, or on chance; and what is not a number never reaches a weight."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from megatron_vrl.algorithms import ALGORITHMS
from megatron_vrl.algorithms import token_loss as loss_of
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.batching.pack import Group
from megatron_vrl.checkpoint.hf_load import hf_tensors, load_hf_weights
from megatron_vrl.config import Algorithm, Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy, TokenLoss, Update
from tests.tiny import GROUPS, present, token_loss
from tests.tiny_models import hf_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("policy") / "hf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def updated(
    checkpoint: Path, mesh: Mesh, *, tokens: int = 10_000, steps: int = 1, **model: Any
) -> tuple[Policy, Update]:
    """The policy after `steps` updates, and what the last one did."""
    cfg = Model(checkpoint=str(checkpoint), **{"dtype": "float32", **model})
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-3), num_steps=steps)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=tokens), mesh)
    for step in range(steps):
        update = policy.update(batches, token_loss, Distribution(), step)
    return policy, update


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}


def test_accumulated_gradients_are_those_of_one_batch(checkpoint: Path, mesh: Mesh) -> None:
    whole, one = updated(checkpoint, mesh)
    cut, many = updated(checkpoint, mesh, tokens=1)
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for (name, ours), theirs in zip(weights(cut).items(), weights(whole).values(), strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_an_update_without_copies_of_keys(checkpoint: Path, mesh: Mesh, recompute: str) -> None:
    """`flash` gives what buckets give."""
    buckets, one = updated(checkpoint, mesh, attention="sdpa")
    cascade, other = updated(checkpoint, mesh, attention="flash", recompute=recompute)
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for (name, ours), theirs in zip(
        weights(cascade).items(), weights(buckets).values(), strict=True
    ):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name


def test_bfloat16_rounds_alike_without_copies_of_keys(checkpoint: Path, mesh: Mesh) -> None:
    _, exact = updated(checkpoint, mesh)
    errors = []
    for attention in ("sdpa", "flash"):
        _, rounded = updated(checkpoint, mesh, dtype="bfloat16", attention=attention)
        errors.append(abs(rounded.grad_norm / exact.grad_norm - 1))
    assert errors[1] < 2 * errors[0] + 1e-2


def test_bfloat16_has_float32_gradients_and_main_weights(checkpoint: Path, mesh: Mesh) -> None:
    _, exact = updated(checkpoint, mesh)
    policy, rounded = updated(checkpoint, mesh, dtype="bfloat16")
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)
    params = list(policy.chunks[0].parameters())
    assert {param.dtype for param in params} == {torch.bfloat16}
    assert {param.main_grad.dtype for param in params} == {torch.float32}
    assert policy.optimizer is not None
    main = [p for group in policy.optimizer.param_groups for p in group["params"]]
    assert {param.dtype for param in main} == {torch.float32}
    # A step smaller than bfloat16's spacing is not lost: it stays in the main weights.
    assert any((p - p.bfloat16()).abs().max() > 0 for p in main)


def test_deterministic_mode_repeats_every_bit(checkpoint: Path, mesh: Mesh) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (updated(checkpoint, mesh, tokens=60, steps=2)[0] for _ in range(2))
        assert first.chunks[0].config.deterministic_mode
    finally:
        torch.use_deterministic_algorithms(False)
    other = weights(second)
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights(first).items())


def test_log_probs_alone_are_those_of_the_update(checkpoint: Path, mesh: Mesh) -> None:
    policy, _ = updated(checkpoint, mesh)
    batches = plan_batches(GROUPS, GROUPS[0], Batch(tokens=60), mesh)
    alone = present(policy.logprobs(batches, Distribution()))
    update = policy.update(batches, token_loss, Distribution(), 1)
    total = sum(float(logprob.sum()) for logprob in alone)
    assert total / sum(map(len, alone)) == pytest.approx(update.metrics["logprob"], rel=1e-5)


def one_update(
    checkpoint: Path,
    mesh: Mesh,
    groups: list[Group],
    token_loss: TokenLoss,
    batch: Batch | None = None,
    normalisation: Any = "global_tokens",
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Update, dict[str, torch.Tensor]]:
    """The policy, its start, what the update did, and every gradient of it."""
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    parallel = Parallel(distributed_optimizer=False)
    policy = Policy(read_architecture(checkpoint), cfg, parallel, mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.keep_reference()
    policy.start_phase(Optimizer(lr=1e-3, weight_decay=0.0), num_steps=1)
    before = weights(policy)
    batches = plan_batches(groups, groups[0], batch or Batch(tokens=10_000), mesh, normalisation)
    old = [logprob + 0.1 for logprob in present(policy.logprobs(batches, Distribution()))]
    reference = [
        logprob - 0.2 for logprob in present(policy.reference_logprobs(batches, Distribution()))
    ]
    update = policy.update(batches, token_loss, Distribution(), 0, old=old, reference=reference)
    gradients = {name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()}
    return before, weights(policy), update, gradients


NAMED = [
    replace(
        group,
        answers=tuple(
            replace(answer, id=f"{group.prompt.id}#{k}") for k, answer in enumerate(group.answers)
        ),
    )
    for group in GROUPS
]
ONE_ANSWER = replace(NAMED[1], answers=NAMED[1].answers[:1])
ONE_TOKEN = replace(NAMED[2].answers[0], token_ids=NAMED[2].answers[0].token_ids[:1],
                    engine_logprobs=NAMED[2].answers[0].engine_logprobs[:1])  # fmt: skip
RAGGED = [NAMED[0], ONE_ANSWER, replace(NAMED[2], answers=(ONE_TOKEN, *NAMED[2].answers[1:]))]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("grpo", "gspo", "cispo") else pytest.param(name, marks=pytest.mark.slow)
        for name in ALGORITHMS
    ],
)
def test_every_loss_is_that_of_the_plain_layout_however_it_is_packed(
    checkpoint: Path, mesh: Mesh, name: Any
) -> None:
    """Ragged answers, one of one token, a group of one answer; all terms of the loss at once."""
    cfg = Algorithm(
        name=name,
        kl=0.1,
        kl_in="loss",
        entropy=0.01,
        rollout_is="sequence",
        rollout_is_threshold=100,
    )
    update = partial(
        one_update, checkpoint, mesh, token_loss=partial(loss_of, cfg=cfg),
        normalisation=cfg.normalisation,
    )  # fmt: skip
    _, _, wanted, gradients = update(RAGGED, batch=Batch(tokens=10_000, layout="plain"))
    assert wanted.metrics["actor/kl"] > 0
    for groups, tokens in ((RAGGED, 10_000), (RAGGED[::-1], 10_000), (RAGGED, 1)):
        _, _, found, ours = update(groups, batch=Batch(tokens=tokens))
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-4, abs=1e-6)
        for parameter, gradient in gradients.items():
            error = (ours[parameter] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{parameter}: {error:.1e}"


def test_without_advantages_no_weight_changes(checkpoint: Path, mesh: Mesh) -> None:
    idle = [replace(g, answers=tuple(replace(a, advantage=0.0) for a in g.answers)) for g in GROUPS]
    loss = partial(loss_of, cfg=Algorithm(kl=0.0, entropy=0.0))
    before, after, update, _ = one_update(checkpoint, mesh, idle, loss)
    assert update.applied and update.grad_norm == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


class _Poison(torch.autograd.Function):
    """Its input; where it is hit, the gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hit)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.masked_fill(ctx.saved_tensors[0], torch.nan), None


def poisoned(
    tokens: Tokens, *, where: str, number: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that goes wrong for the answer with this advantage."""
    loss, metrics = loss_of(tokens, cfg=Algorithm())
    hit = tokens.advantage == number
    if where == "forward":
        return loss * torch.where(hit, torch.nan, 1.0), metrics
    return _Poison.apply(loss, hit), metrics


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_gradient_that_is_no_number_is_not_applied_and_named(
    checkpoint: Path, mesh: Mesh, where: str
) -> None:
    number = float(torch.tensor(NAMED[2].answers[1].advantage))
    loss = partial(poisoned, where=where, number=number)
    one_each = Batch(tokens=1)
    before, after, update, _ = one_update(checkpoint, mesh, NAMED, loss, one_each)
    assert not update.applied
    everyone = tuple(answer.id for answer in NAMED[2].answers)
    assert update.suspects == (everyone[1:2] if where == "forward" else everyone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_an_update_that_raises_leaves_megatrons_config_as_it_was(
    checkpoint: Path, mesh: Mesh
) -> None:
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(overlap=True), mesh)
    load_hf_weights(policy.chunks, checkpoint)
    policy.start_phase(Optimizer(lr=1e-3), num_steps=1)
    config = policy.chunks[0].config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    seen = []

    def failing(tokens: Tokens) -> NoReturn:
        seen.append([getattr(config, name) is not None for name in names])
        raise ZeroDivisionError

    batches = plan_batches(GROUPS, GROUPS[0], Batch(), mesh)
    with pytest.raises(ZeroDivisionError):
        policy.update(batches, failing, Distribution(), 0)
    assert seen == [[True, True, True]]
    assert [getattr(config, name) for name in names] == [None, None, None]
