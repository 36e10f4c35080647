"""A PEFT adapter that the trainer writes, in vLLM's LoRA slots: log-probs equal PEFT's."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from megatron_vrl.checkpoint.peft_files import write_peft
from megatron_vrl.config import Lora
from megatron_vrl.models.adapters import adapter_shapes
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.chunk import whole_model
from tests.running import run_python

pytestmark = pytest.mark.slow


def test_vllm_loads_a_written_adapter(checkpoint: Path, tmp_path: Path) -> None:
    arch, lora = read_architecture(checkpoint), Lora(rank=8, alpha=16)
    drawn = torch.Generator().manual_seed(0)
    shapes = adapter_shapes(arch, lora, whole_model(arch))
    factors = {n: 0.05 * torch.randn(shape, generator=drawn) for n, shape in shapes.items()}
    write_peft(tmp_path / "adapter", lora, str(checkpoint), factors)
    ids = list(range(10, 40))

    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        without = base(input_ids=torch.tensor([ids])).logits[0, :-1]
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        logits = adapted(input_ids=torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (logits - without).abs().max() > 0.1  # the adapter is not small

    script = Path(__file__).with_name("adapter_in_vllm.py")
    done = run_python(script, checkpoint, tmp_path / "adapter", json.dumps(ids))
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
