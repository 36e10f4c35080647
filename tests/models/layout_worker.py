"""Two updates of a tiny model in each of several layouts, in the same processes.

Run by torchrun as `layout_worker.py DIRECTORY [NAME ...]`. It trains the named layouts, or all
`LAYOUTS` for this number of processes, on the checkpoints DIRECTORY/MODEL of `MODELS`, and writes
the results that all layouts must share to DIRECTORY/NAME-MODEL.pt. Layouts of one process need no
torchrun.
"""

import collections
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_vrl.checkpoint.checkpoint import load_weights
from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.checkpoint.hf_load import hf_tensors
from megatron_vrl.checkpoint.peft_files import adapter_export
from megatron_vrl.config import Batch, Model, Optimizer, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import Policy
from tests import tiny, tiny_qwen3_vl
from tests.tiny import micro_batches, token_loss

FLASH = {"attention": "flash"}  # `auto` is sdpa on a CPU
PLAIN_DDP = {"distributed_optimizer": False}  # gradients are whole only without it
FULL = {"recompute": "full", "recompute_vision": "full"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    processes: int
    parallel: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    prompts: Literal["shared", "plain"] = "shared"  # plain: repeated before every answer
    models: tuple[str, ...] = ("untied", "tied")
    text_rank: bool = False  # the second data rank has text alone and no picture

    @property
    def all_models(self) -> tuple[str, ...]:
        """The models of both families: a Qwen3-VL beside the Qwen2.5-VL."""
        return (*self.models, f"qwen3-{self.models[-1]}")


LAYOUTS = {
    "one": Layout(processes=1, parallel=PLAIN_DDP),
    "one-plain": Layout(processes=1, parallel=PLAIN_DDP, prompts="plain"),
    "one-recompute": Layout(processes=1, parallel=PLAIN_DDP, model=FULL),
    "one-recompute-one-layer": Layout(
        processes=1, parallel=PLAIN_DDP, model={"recompute": "full", "recompute_num_layers": 1}
    ),
    "one-recompute-selective": Layout(
        processes=1, parallel=PLAIN_DDP, model={"recompute": "selective"}
    ),
    "one-four-kv-heads": Layout(processes=1, parallel=PLAIN_DDP, models=("four-kv-heads",)),
    "dp2": Layout(processes=2, parallel=PLAIN_DDP, models=("tied",)),
    "dp2-distributed-optimizer": Layout(processes=2, parallel={}, models=("untied",)),
    "tp2": Layout(processes=2, parallel=PLAIN_DDP | {"tensor": 2}),
    "tp2-sp": Layout(
        processes=2,
        parallel=PLAIN_DDP | {"tensor": 2, "sequence": True},
        model=FLASH,
        models=("untied",),
    ),
    "pp2": Layout(processes=2, parallel=PLAIN_DDP | {"pipeline": 2}),
    "pp2-uneven": Layout(
        processes=2,
        parallel=PLAIN_DDP | {"pipeline": 2, "layers_per_chunk": [1, 3]},
        models=("tied",),
    ),
    "pp2-virtual2": Layout(processes=2, parallel=PLAIN_DDP | {"pipeline": 2, "virtual": 2}),
    "cp2": Layout(processes=2, parallel=PLAIN_DDP | {"context": 2}),
    "cp2-recompute": Layout(
        processes=2,
        parallel=PLAIN_DDP | {"context": 2},
        model=FLASH | FULL,
        models=("tied",),
    ),
    "dp2-overlap-recompute": Layout(
        processes=2, parallel={"overlap": True}, model=FULL, models=("tied",)
    ),
    "dp2-text-rank": Layout(processes=2, parallel=PLAIN_DDP, models=("tied",), text_rank=True),
    "dp2-text-rank-overlap": Layout(
        processes=2, parallel={"overlap": True}, models=("untied",), text_rank=True
    ),
    "tp4": Layout(processes=4, parallel=PLAIN_DDP | {"tensor": 4}, models=("four-kv-heads",)),
    "pp4": Layout(processes=4, parallel=PLAIN_DDP | {"pipeline": 4}, models=("tied",)),
    "tp2-cp2": Layout(
        processes=4,
        parallel=PLAIN_DDP | {"tensor": 2, "context": 2},
        model=FLASH,
        models=("tied",),
    ),
    "cp2-dp2-distributed-optimizer": Layout(processes=4, parallel={"context": 2}, models=("tied",)),
    "pp2-virtual2-dp2-overlap": Layout(
        processes=4, parallel={"pipeline": 2, "virtual": 2, "overlap": True}, models=("tied",)
    ),
    "tp2-sp-pp2-distributed-optimizer": Layout(
        processes=4, parallel={"tensor": 2, "sequence": True, "pipeline": 2}, models=("tied",)
    ),
    "tp2-sp-cp2-pp2": Layout(
        processes=8,
        parallel=PLAIN_DDP | {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2},
        models=("tied",),
    ),
}
LORA: dict[str, Any] = {"freeze_vision": True, "lora": {"rank": 3, "alpha": 5, "merger": True}}
for name, parallel in {
    "one": {},
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "tp2-sp-cp2": {"tensor": 2, "sequence": True, "context": 2},
}.items():
    LAYOUTS[f"{name}-lora"] = Layout(
        processes=max(1, 2 * len(parallel.keys() - {"sequence"})),
        parallel=PLAIN_DDP | parallel,
        model=LORA | {"recompute": "none" if name in ("one", "tp2") else "full"},
        models=("tied",),
    )
for frozen in ("vision", "merger", "language"):
    model = {f"freeze_{frozen}": True}
    for name, parallel in {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}.items():
        LAYOUTS[f"{name}-frozen-{frozen}"] = Layout(
            processes=2 if parallel else 1,
            parallel=PLAIN_DDP | parallel,
            model=model,
            models=("untied",),
        )


def train(checkpoint: Path, layout: Layout) -> dict[str, Any]:
    """Return the results of one layout, equal on all ranks. Every rank must call it."""
    third = checkpoint.name.startswith("qwen3-")
    sizes = layout.parallel
    chunks = sizes.get("pipeline", 1) * sizes.get("virtual", 1)
    if third and chunks > 1:  # DeepStack needs three of the six layers on the first stage
        sizes = sizes | {"layers_per_chunk": {2: [4, 2], 4: [3, 1, 1, 1]}[chunks]}
    parallel = Parallel.model_validate(sizes)
    mesh = init_mesh(parallel, seed=1)
    keys = dict(layout.model)
    if "lora" in keys:
        keys["lora"] = keys["lora"] | {"adapter": f"{checkpoint}-adapter"}
    cfg = Model(checkpoint=str(checkpoint), dtype="float32", **keys)
    policy = Policy(read_architecture(checkpoint), cfg, parallel, mesh)
    load_weights(checkpoint, policy)
    policy.keep_reference()
    policy.start_phase(Optimizer(lr=1e-3, clip_grad=1.0), num_steps=2)
    groups = (tiny_qwen3_vl if third else tiny).GROUPS
    if layout.text_rank:
        mine = [*(groups[3:] if mesh.data.rank else groups[:3])]
        batches = plan_batches(mine, mine[0], Batch(tokens=40), mesh)
        assert mesh.data.rank == 0 or not any(batch.visuals for batch in batches)
    else:
        batches = micro_batches(groups, mesh, layout.prompts)
    result: dict[str, Any] = {"lengths": [len(batch.rows) for batch in batches]}
    messages = Messages()
    for step in range(2):
        reference = policy.reference_logprobs(batches, Distribution())
        update = policy.update(batches, token_loss, Distribution(), step, reference=reference)
        numbers = {"loss": update.loss, "grad_norm": update.grad_norm, **update.metrics}
        for name, value in numbers.items():
            result.setdefault(name, []).append(value)
        if step == 0 and not parallel.distributed_optimizer:
            # clipping scaled the gradients in place by the same factor in every layout
            grads = _export(policy, _gradient).tensors()
            result["grads"] = {name: grad.clone() for name, grad in grads}
    result["messages"] = messages.stop()
    result["weights"] = {name: t.clone() for name, t in hf_tensors(policy.chunks)}
    result["base"] = policy.base_digest
    del policy
    gc.collect()  # modules in reference cycles hold the groups, and the groups their threads
    close_mesh()
    return result


class Messages:
    """Counts of the messages between pipeline stages that this rank sends and receives."""

    NAMES = ("isend", "irecv", "batch_isend_irecv")

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._real = {name: getattr(dist, name) for name in self.NAMES}
        for name, real in self._real.items():
            setattr(dist, name, partial(self._counted, name, real))

    def _counted(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._counts[name] += 1
        return real(*args, **kwargs)

    def stop(self) -> dict[str, int]:
        for name, real in self._real.items():
            setattr(dist, name, real)
        return dict(self._counts)


def _export(policy: Policy, value: Callable[[torch.Tensor], torch.Tensor]) -> WeightExport:
    """The export of the parameters that learn: the adapters, or all weights."""
    if policy.lora.rank:
        return adapter_export(policy, value)
    return WeightExport(policy.chunks, value=value)


def _gradient(param: torch.Tensor) -> torch.Tensor:
    """NaN stands for none."""
    return param.main_grad if param.requires_grad else torch.full_like(param, torch.nan)  # type: ignore[attr-defined]


def main(directory: Path, names: list[str]) -> None:
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for name in names or LAYOUTS:
        layout = LAYOUTS[name]
        for model in layout.all_models if layout.processes == world else ():
            result = train(directory / model, layout)
            if rank == world - 1:
                torch.save(result, directory / f"{name}-{model}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
