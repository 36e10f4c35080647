"""Policy model: forward pass, backward pass and optimizer update over all ranks.

Every rank of the mesh calls every method, with the micro-batches of its data-parallel rank. All
ranks must have the same number of micro-batches. The loss is the sum of token losses times token
weights. Gradients are summed and never averaged, so the split of a batch does not change them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_vrl.algorithms.tokens import Tokens, local_sequence_sum
from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.config import Model, Optimizer, Parallel
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.fp8_monitor import fp8_metrics, reset_fp8_metrics
from megatron_vrl.models.inputs import PassInputs
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.lora import without_adapters
from megatron_vrl.models.precision import check_available
from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.parallel.mesh import Mesh, gather_objects, world_axis
from megatron_vrl.policy.optimizer import clipped_step, learning_rate, make_optimizer
from megatron_vrl.policy.partial_gradients import sum_partial_gradients
from megatron_vrl.policy.pipeline import communication
from megatron_vrl.policy.vision_outputs import VisionOutputs

TokenLoss = Callable[[Tokens], tuple[Tensor, dict[str, Tensor]]]  # loss [N], metrics {name: [N]}
# The function gets the PassInputs; on the last stage, the output as well.
Job = tuple[MicroBatch, Callable[..., Any]]
FINITE = "finite"  # a record's entry [N]: True where a token's loss is finite; the rest are sums
LogProbs = Sequence[Tensor | None]  # one [N] for each micro-batch; None except on the last stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Result of one optimizer update, equal on every rank."""

    loss: float
    grad_norm: float
    applied: bool  # False: a gradient was not finite, so the weights were not changed
    suspects: tuple[str, ...]  # if not applied: ids of answers that may be the cause
    lr: float
    metrics: dict[str, float]  # token means; "_max": maxima; "fp8/": see models/fp8_monitor.py


class Policy:
    """Model wrapped for data parallelism, with the optimizer of the current phase."""

    def __init__(
        self, arch: Architecture, model: Model, parallel: Parallel, mesh: Mesh, seed: int = 1
    ) -> None:
        """seed: of new adapters."""
        self.mesh = mesh
        self.arch = arch
        self.lora, self.seed = model.lora, seed
        self.base = model.checkpoint
        self.base_digest = ""  # of the frozen base under adapters, once it is loaded
        self._model_cfg, self._parallel_cfg = model, parallel
        check_available(model, parallel, mesh.device)
        self.chunks = self._built()
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        self._ddp = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in self.chunks]
        self.optimizer: MegatronOptimizer | None = None
        self._reference: list[VisionLanguageModel] = []
        self.vision_outputs = VisionOutputs(
            self.chunks[0].vision,
            family_of(arch).pixels,
            frozen=model.freeze_vision,
            memory_mib=model.vision_output_cache_mib,
        )

    def _built(self) -> list[VisionLanguageModel]:
        """Return this rank's chunks of layers, one for each virtual pipeline stage."""
        model, parallel, mesh = self._model_cfg, self._parallel_cfg, self.mesh
        return [
            VisionLanguageModel(self.arch, model, parallel, mesh, virtual).to(mesh.device)
            for virtual in range(parallel.virtual)
        ]

    def start_phase(self, cfg: Optimizer, num_steps: int) -> None:
        """Create a new optimizer for the current weights."""
        self._optimizer_cfg, self._num_steps = cfg, num_steps
        self.optimizer = make_optimizer(
            self._ddp,
            cfg,
            bf16=self._model_cfg.dtype == "bfloat16",
            distributed=self._parallel_cfg.distributed_optimizer,
        )

    def keep_reference(self) -> None:
        """Copy the current weights as the reference model of the KL term.

        With `model.lora` the reference model is the frozen base: the same modules, with their
        adapters off.

        The copy keeps requires_grad, although it gets no gradients. torch chooses the kernels of a
        matrix product by that flag, and only equal kernels give a KL term of exactly 0.
        """
        if self.lora.rank:
            self._reference = self.chunks
            return
        self._reference = self._built()
        for kept, chunk in zip(self._reference, self.chunks, strict=True):
            kept.load_state_dict(chunk.state_dict())

    def logprobs(self, batches: Sequence[MicroBatch], of: Distribution) -> LogProbs:
        """Return the log-probs [N] of every batch under the policy.

        They are None except on the last pipeline stage.
        """
        return self._logprobs(self.chunks, batches, of)

    def reference_logprobs(self, batches: Sequence[MicroBatch], of: Distribution) -> LogProbs:
        """Return the log-probs [N] of every batch under the reference model.

        They are None except on the last pipeline stage, and None everywhere without a reference
        model (`keep_reference`).
        """
        if not self._reference:
            return [None] * len(batches)
        with without_adapters(self._reference):
            return self._logprobs(self._reference, batches, of)

    def _logprobs(
        self, chunks: list[VisionLanguageModel], batches: Sequence[MicroBatch], of: Distribution
    ) -> LogProbs:
        jobs = [(batch, _logprob_of) for batch in batches]
        self.vision_outputs.compare(chunks[0].vision)
        with torch.no_grad():
            outputs = self._run(chunks, jobs, of, forward_only=True)
        return outputs or [None] * len(batches)

    def update(
        self,
        batches: Sequence[MicroBatch],
        token_loss: TokenLoss,
        of: Distribution,
        step: int,
        *,
        old: LogProbs | None = None,
        reference: LogProbs | None = None,
    ) -> Update:
        """Make one optimizer update from this rank's micro-batches, after `step` updates.

        `old` holds the log-probs from before the first update on these rollouts; None takes those
        of this update's forward pass. `reference` holds the reference model's log-probs for the KL
        term; None means no KL term.
        """
        assert self.optimizer is not None, "start_phase first"
        absent: LogProbs = [None] * len(batches)
        jobs = [
            (batch, partial(self._weighted, token_loss, before, kept))
            for batch, before, kept in zip(batches, old or absent, reference or absent, strict=True)
        ]
        self._zero_gradients()
        reset_fp8_metrics(self.chunks)
        with self._reducing_gradients():
            records = self._run(self._ddp, jobs, of)
        metrics = self._reduce(records)
        if self._model_cfg.fp8 != "none":
            metrics |= fp8_metrics(self.chunks, self.mesh.device)
        lr = learning_rate(self._optimizer_cfg, step, self._num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = clipped_step(self.optimizer, self._optimizer_cfg.clip_grad)
        applied = math.isfinite(grad_norm)
        return Update(
            loss=metrics.pop("loss"),
            grad_norm=grad_norm if applied else float("nan"),
            applied=applied,
            suspects=() if applied else self._suspects(jobs, of),
            lr=lr,
            metrics=metrics,
        )

    def _zero_gradients(self) -> None:
        assert self.optimizer is not None
        for wrapped in self._ddp:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _suspects(self, jobs: Sequence[Job], of: Distribution) -> tuple[str, ...]:
        """Return the answers of all ranks whose micro-batch has a gradient that is not finite.

        The micro-batches are computed again, a few at a time, and their gradients are checked
        before data-parallel ranks sum them. A micro-batch names the answers with a loss that is
        not finite, or all its answers if only the backward pass fails.
        """
        at_a_time = self.mesh.pipeline.size if self.mesh.interleaved else 1
        found: set[str] = set()
        with ExitStack() as local, self._reducing_gradients(finalize=False):
            for wrapped in self._ddp:
                local.enter_context(wrapped.no_sync())
            for start in range(0, len(jobs), at_a_time):
                self._zero_gradients()
                part = jobs[start : start + at_a_time]
                records = self._run(self._ddp, part, of)
                if self._gradients_are_finite(self.mesh.model.group):
                    continue
                for (batch, _), record in zip(part, records, strict=False):  # [] except on the last
                    bad = record[FINITE].cpu().numpy() == 0
                    named = batch.sequence[bad] if bad.any() else batch.sequence
                    found |= {batch.answer_id[answer] for answer in named}
        self._zero_gradients()
        everywhere = gather_objects(world_axis(self.mesh), found)
        return tuple(sorted(set().union(*everywhere)))

    @contextmanager
    def _reducing_gradients(self, finalize: bool = True) -> Iterator[None]:
        """Set the functions by which Megatron's schedule reduces gradients, in this block only.

        Without `finalize` each rank keeps its own gradients; they are not summed over ranks.
        """
        functions: dict[str, Any] = {}
        functions["finalize_model_grads_func"] = self._finalize_gradients if finalize else None
        if self._parallel_cfg.overlap:
            pause = [wrapped.no_sync for wrapped in self._ddp]
            begin = [wrapped.start_grad_sync for wrapped in self._ddp]
            several = len(self._ddp) > 1  # for one chunk Megatron expects a function, not a list
            functions["no_sync_func"] = pause if several else pause[0]
            functions["grad_sync_func"] = begin if several else begin[0]
        with changed_config(self.chunks[0].config, functions):  # schedules read chunk 0's
            yield

    def _run(
        self,
        chunks: Sequence[Any],
        jobs: Sequence[Job],
        of: Distribution,
        forward_only: bool = False,
    ) -> list[Any]:
        """Run Megatron's schedule over the micro-batches.

        Return the result of each job's function on the last pipeline stage, and [] on other stages.
        """

        prepared = [(self.chunks[0].inputs(batch), on_output) for batch, on_output in jobs]

        def forward_step(data: Iterator[Any], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
            inputs, on_output = next(data)
            tower = get_attr_wrapped_model(chunk, "vision")  # None except on the first stage
            patches, encoded = self.vision_outputs.of(tower, inputs) if tower else (None, None)
            return chunk(inputs, patches, of, encoded=encoded), partial(on_output, inputs)

        records: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(prepared) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(jobs),
            seq_length=len(jobs[0][0].token_ids),  # read only by the interleaved schedule
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **communication(self.mesh, self.chunks[0].config, [batch for batch, _ in jobs]),
        )
        return records

    def _finalize_gradients(
        self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Call Megatron's `finalize_model_grads`, then sum what else is partial on a tensor rank.

        Megatron's function sums gradients over data ranks, tied embeddings and sequence-parallel
        norms.
        """
        finalize_model_grads(model, None, **kwargs)
        sum_partial_gradients(self.chunks, self.mesh.tensor)

    def _gradients_are_finite(self, group: dist.ProcessGroup | None) -> bool:
        """Return whether all gradients of the ranks of `group` are finite."""
        # Minimum and maximum are NaN if any value is. `isfinite` would need a copy of the buffer.
        extremes = [
            torch.stack(buffer.grad_data.aminmax())
            for wrapped in self._ddp
            for buffer in wrapped.buffers
        ]
        flag = torch.ones((), device=self.mesh.device)
        if extremes:
            flag = torch.cat(extremes).isfinite().all().float()
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
        return bool(flag.item())

    def _reduce(self, records: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return means over the tokens of the whole step, from the token sums of all ranks."""
        names = sorted(records[0].keys() - {FINITE}) if records else []
        box: list[Any] = [names]
        last = dist.get_global_rank(self.mesh.pipeline.group, self.mesh.pipeline.size - 1)
        if self.mesh.pipeline.size > 1:
            dist.broadcast_object_list(box, last, group=self.mesh.pipeline.group)
        names = box[0]
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.mesh.device)
        is_max = torch.tensor([name.endswith("_max") for name in names], device=self.mesh.device)
        for record in records:
            row = torch.stack([record[name].double() for name in names])
            totals = torch.where(is_max, torch.maximum(totals, row), totals + row)
        peaks = totals.clone()
        dist.all_reduce(totals, group=self.mesh.batch.group)
        dist.all_reduce(peaks, dist.ReduceOp.MAX, group=self.mesh.batch.group)
        totals = torch.where(is_max, peaks, totals)
        if self.mesh.pipeline.size > 1:
            dist.broadcast(totals, last, group=self.mesh.pipeline.group)
        values = dict(zip(names, totals.tolist(), strict=True))
        tokens = max(1.0, values.pop("tokens"))
        whole = {"loss"}
        return {
            name: value if name in whole or name.endswith("_max") else value / tokens
            for name, value in values.items()
        }

    def _weighted(
        self,
        token_loss: TokenLoss,
        old: Tensor | None,
        reference: Tensor | None,
        inputs: PassInputs,
        output: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss, the token count and the record of one micro-batch, for Megatron."""
        logprob, entropy = output
        old = logprob.detach() if old is None else old
        sampled = ~inputs.engine_logprob.isnan()
        losses, metrics = token_loss(
            Tokens(
                logprob=logprob,
                old_logprob=old,
                engine_logprob=torch.where(sampled, inputs.engine_logprob, old),
                advantage=inputs.advantage,
                entropy=entropy,
                reference=reference,
                sequence_sum=local_sequence_sum(
                    inputs.sequence, len(inputs.batch.answer_start), self._over_context
                ),
            )
        )
        loss = (losses * inputs.weight).sum()
        counted = inputs.weight > 0  # tokens of dummy micro-batches have weight 0
        some = len(losses) > 0  # a context rank may have no loss token
        record = {
            name: (value.detach() * counted).amax()
            if some and name.endswith("_max")
            else (value.detach() * counted).sum()
            for name, value in metrics.items()
        }
        record |= {"loss": loss.detach().clone(), "tokens": counted.sum()}
        record[FINITE] = torch.isfinite(losses.detach())
        return loss, counted.sum().int(), record

    def _over_context(self, sums: Tensor) -> Tensor:
        """Sum in place over the context-parallel ranks."""
        if self.mesh.context.size > 1:
            dist.all_reduce(sums, group=self.mesh.context.group)
        return sums


@contextmanager
def changed_config(config: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set fields of a Megatron config in this block, and restore them at its end, also after an
    error."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _logprob_of(inputs: PassInputs, output: Tensor, non_loss_data: bool) -> Tensor:
    return output[0].clone()
