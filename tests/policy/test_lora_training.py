"""Training with adapters: what learns, the reference model, checkpoints and their base."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vrl.checkpoint.checkpoint import load_checkpoint, load_weights, save_checkpoint
from megatron_vrl.checkpoint.convert import convert_to_hf, convert_to_peft
from megatron_vrl.checkpoint.hf_load import hf_tensors
from megatron_vrl.checkpoint.peft_files import CONFIG, TENSORS, save_peft
from megatron_vrl.checkpoint.torch_dist import TorchDistReader
from megatron_vrl.config import Lora, Model, Optimizer, Parallel
from megatron_vrl.errors import CheckpointError, ConfigError
from megatron_vrl.models.adapters import check_lora, is_adapter
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.models.lora import adapters, new_factor
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.policy import Policy, Update
from tests.tiny import GROUPS, micro_batches, present, sharded_tensors, token_loss
from tests.tiny_models import hf_model, save

KEYS: dict[str, Any] = {"dtype": "float32", "freeze_vision": True, "freeze_merger": True}
LORA = Lora(rank=4, alpha=8)
OF = Distribution()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("lora") / "hf")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def policy_of(mesh: Mesh, base: Path, lora: Lora = LORA, **keys: Any) -> Policy:
    cfg = Model(checkpoint=str(base), lora=lora, **{**KEYS, **keys})
    policy = Policy(read_architecture(base), cfg, Parallel(), mesh)
    load_weights(base, policy)
    return policy


def begin(policy: Policy) -> Policy:
    policy.keep_reference()
    policy.start_phase(Optimizer(lr=1e-2), num_steps=4)
    return policy


def step(policy: Policy, number: int) -> Update:
    batches = micro_batches(GROUPS, policy.mesh)
    reference = policy.reference_logprobs(batches, OF)
    return policy.update(batches, token_loss, OF, number, reference=reference)


def held(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.chunks[0].named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_adapters_learn_and_the_base_is_the_reference(
    mesh: Mesh, base: Path, recompute: str
) -> None:
    policy = begin(policy_of(mesh, base, recompute=recompute))
    start, batches = held(policy), micro_batches(GROUPS, mesh)
    of_base = present(policy_of(mesh, base, Lora()).logprobs(batches, OF))
    gaps = [step(policy, number).metrics["reference_gap_max"] for number in range(3)]
    assert gaps[0] == 0.0 and gaps[2] > 1e-3
    reference = present(policy.reference_logprobs(batches, OF))
    assert all(torch.equal(a, b) for a, b in zip(reference, of_base, strict=True))
    changed = {n for n, p in held(policy).items() if not torch.equal(p, start[n])}
    assert changed == {name for name in start if is_adapter(name)}
    sizes = sum(start[name].numel() for name in changed)
    assert policy.optimizer is not None
    groups = policy.optimizer.param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == sizes
    assert sum(buffer.numel_unpadded for buffer in policy._ddp[0].buffers) == sizes
    assert policy._reference is policy.chunks  # no second copy


def test_recompute_gives_the_same_gradients(mesh: Mesh, base: Path) -> None:
    kept, again = (begin(policy_of(mesh, base, recompute=level)) for level in ("none", "full"))
    for number in range(2):
        assert step(kept, number).loss == step(again, number).loss
    assert same(held(kept), held(again))


def test_new_adapters_are_pefts_and_depend_on_the_seed() -> None:
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    drawn = new_factor(name, (64, 100), seed=1)
    assert 0.097 < drawn.abs().max() <= 0.1  # uniform within 1 / sqrt(inputs)
    assert drawn.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert torch.equal(drawn, new_factor(name, (64, 100), seed=1))
    assert not torch.equal(drawn, new_factor(name, (64, 100), seed=2))
    assert not new_factor(name.replace("lora_A", "lora_B"), (100, 64), seed=1).any()


def test_a_checkpoint_holds_adapters_and_resumes(mesh: Mesh, base: Path, tmp_path: Path) -> None:
    whole = begin(policy_of(mesh, base))
    step(whole, 0)
    save_checkpoint(tmp_path / "1", whole, {}, base)
    names = TorchDistReader(tmp_path / "1" / "weights").names()
    assert names and all(is_adapter(name) for name in names)
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in names)
    resumed = begin(policy_of(mesh, base))
    load_checkpoint(tmp_path / "1", resumed)
    first, second = step(whole, 1), step(resumed, 1)
    assert first.loss == second.loss and same(held(whole), held(resumed))
    convert_to_peft(tmp_path / "1", tmp_path / "peft")
    again = policy_of(mesh, base, LORA.model_copy(update={"adapter": str(tmp_path / "peft")}))
    convert_to_hf(tmp_path / "1", tmp_path / "hf")
    merged = sharded_tensors(tmp_path / "hf")
    for name, tensor in hf_tensors(again.chunks):
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6, msg=name)
    scored = policy_of(mesh, base)
    load_weights(tmp_path / "1", scored)
    assert same(held(scored), held(again))


def test_a_checkpoint_of_another_base_or_other_adapters_is_refused(
    mesh: Mesh, base: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "1", policy_of(mesh, base), {}, base)
    other = save(hf_model(seed=1), tmp_path / "other")
    cases = {
        f"those of model.checkpoint={other} differ": policy_of(mesh, other),
        "adapters with rank=4, and model.lora.rank is 2": policy_of(mesh, base, Lora(rank=2)),
        "holds adapters only: set model.lora": policy_of(mesh, base, Lora()),
    }
    for message, policy in cases.items():
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path / "1", policy)
    save_checkpoint(tmp_path / "whole", policy_of(mesh, base, Lora()), {}, base)
    with pytest.raises(CheckpointError, match="holds whole weights"):
        load_checkpoint(tmp_path / "whole", begin(policy_of(mesh, base)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has use_dora=true, and only plain LoRA"),
        ({"bias": "all"}, 'has bias="all", and only plain LoRA'),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save="),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights="),
        ({"r": 8}, "has r=8, and model.lora.rank is 4: set model.lora.rank"),
        ({"lora_alpha": 1}, "has lora_alpha=1, and model.lora.alpha is 8.0"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(
    mesh: Mesh, base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_peft(policy_of(mesh, base), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config | change))
    lora = LORA.model_copy(update={"adapter": str(tmp_path / "peft")})
    with pytest.raises(CheckpointError, match=message):
        policy_of(mesh, base, lora)


def test_an_adapter_of_other_layers_is_refused(mesh: Mesh, base: Path, tmp_path: Path) -> None:
    save_peft(policy_of(mesh, base), tmp_path / "peft")
    of = {"adapter": str(tmp_path / "peft")}
    with pytest.raises(CheckpointError, match=r"holds .*, unlike the layers of model\.lora"):
        policy_of(mesh, base, LORA.model_copy(update={**of, "targets": ("q_proj",)}))
    stored = load_file(tmp_path / "peft" / TENSORS)
    name = min(stored)
    save_file({**stored, name: stored[name][:, :3].contiguous()}, tmp_path / "peft" / TENSORS)
    with pytest.raises(CheckpointError, match="the adapter is of another model"):
        policy_of(mesh, base, LORA.model_copy(update=of))
    shutil.rmtree(tmp_path / "peft")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        policy_of(mesh, base, LORA.model_copy(update=of))


def test_merged_weights_change_no_parameter(mesh: Mesh, base: Path) -> None:
    policy = begin(policy_of(mesh, base))
    step(policy, 0)
    before = held(policy)
    merged = {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}
    assert same(held(policy), before)
    frozen = {name: tensor.clone() for name, tensor in hf_tensors(policy_of(mesh, base).chunks)}
    differ = {name for name in merged if not torch.equal(merged[name], frozen[name])}
    assert differ == {n for n in merged if "layers" in n and n.endswith("_proj.weight")}
    assert len(list(adapters(policy.chunks))) == 4 * policy.arch.layers


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"freeze_vision": False}, r"set model\.freeze_vision=true"),
        ({"freeze_language": True}, r"set model\.freeze_language=false"),
        ({"lora": Lora(rank=4, merger=True)}, r"set model\.freeze_merger=false"),
        ({"layers": "transformer_engine"}, r"set model\.layers=megatron"),
        ({"lora": Lora(merger=True)}, r"set model\.lora\.rank"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_lora(Model(checkpoint="none", **{**KEYS, "lora": LORA, **keys}))
