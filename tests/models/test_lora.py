"""LoRA compared with PEFT on transformers: log-probs, gradients, files, merged weights; the frozen
base is the reference model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from megatron_vrl.batching.pack import pack
from megatron_vrl.checkpoint.checkpoint import load_weights
from megatron_vrl.checkpoint.hf_load import hf_tensors
from megatron_vrl.checkpoint.peft_files import TENSORS, save_peft
from megatron_vrl.config import Lora, Model, Parallel
from megatron_vrl.models.adapters import adapter_rows, target_modules
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import released_name
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.policy import Policy
from tests import tiny, tiny_qwen3_vl
from tests.models.against_hf import forward, published_logprobs
from tests.tiny import present
from tests.tiny_models import MODELS, save

FROZEN: dict[str, Any] = {"freeze_vision": True, "dtype": "float32"}
CASES = {
    "all": Lora(rank=4, alpha=6),
    "attention": Lora(rank=3, alpha=8, use_rslora=True, targets=("q_proj", "v_proj", "down_proj")),
    "merger": Lora(rank=2, targets=("up_proj", "o_proj"), merger=True),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


def groups_of(model: str) -> list[Any]:
    return list((tiny_qwen3_vl if model.startswith("qwen3") else tiny).GROUPS)


def peft_model(base: PreTrainedModel, cfg: Lora) -> PeftModel:
    """PEFT's model whose adapters are not 0."""
    torch.manual_seed(5)
    wanted = LoraConfig(
        r=cfg.rank,
        lora_alpha=int(cfg.alpha),
        use_rslora=cfg.use_rslora,
        target_modules=target_modules(cfg),
    )
    model = get_peft_model(base, wanted)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    assert isinstance(model, PeftModel)
    return model


def policy_of(mesh: Mesh, base: Path, cfg: Lora, **keys: Any) -> Policy:
    model = Model(
        checkpoint=str(base), lora=cfg, freeze_merger=not cfg.merger, **{**FROZEN, **keys}
    )
    policy = Policy(read_architecture(base), model, Parallel(), mesh)
    load_weights(base, policy)
    return policy


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", ["untied", "qwen3-tied"])
def test_equals_peft_on_transformers(mesh: Mesh, tmp_path: Path, model: str, case: str) -> None:
    base, cfg = MODELS[model](), CASES[case]
    save(base, tmp_path / "base")
    oracle = peft_model(base, cfg)
    oracle.save_pretrained(str(tmp_path / "peft"))
    lora = cfg.model_copy(update={"adapter": str(tmp_path / "peft")})
    policy = policy_of(mesh, tmp_path / "base", lora)
    groups, family = groups_of(model), family_of(policy.arch)

    logprob, _ = forward(policy.chunks[0], pack(groups), Distribution())
    pairs = [(group, answer) for group in groups for answer in group.answers]
    expected = torch.cat([published_logprobs(oracle, *p, family.pixels) for p in pairs])  # type: ignore[arg-type]
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(expected))
    (logprob * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = {n.replace(".default", ""): p for n, p in oracle.named_parameters() if "lora" in n}
    ours = dict(policy.chunks[0].named_parameters())
    rows = adapter_rows(policy.arch, cfg, policy.chunks[0].chunk)
    assert {row.hf_names[0] for row in rows} == theirs.keys()
    for row in rows:
        want, got = present([theirs[row.hf_names[0]].grad])[0], ours[row.megatron].main_grad
        error = (got - want).norm() / want.norm()
        assert error < 1e-5, f"{row.megatron}: relative error {error:.1e}"
    assert {name for name, p in ours.items() if p.requires_grad} == {row.megatron for row in rows}

    save_peft(policy, tmp_path / "saved")
    stored, again = load_file(tmp_path / "peft" / TENSORS), load_file(tmp_path / "saved" / TENSORS)
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    loaded = PeftModel.from_pretrained(MODELS[model](), str(tmp_path / "saved"))
    found = torch.cat([published_logprobs(loaded, *p, family.pixels) for p in pairs])  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    merged = oracle.merge_and_unload().state_dict()
    merged = {released_name(family.weights, name): tensor for name, tensor in merged.items()}
    for name, tensor in hf_tensors(policy.chunks):
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6, msg=name)
