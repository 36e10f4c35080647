"""A PEFT adapter that the trainer writes, in vLLM's LoRA slots: log-probs equal PEFT's."""

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
from megatron_vrl.rollout.vllm.startup import import_vllm, preserve_trainer_state

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

    vllm = import_vllm()
    from vllm.lora.request import LoRARequest

    with preserve_trainer_state(), torch.compiler.set_stance("force_eager"):
        llm = vllm.LLM(
            str(checkpoint),
            dtype="float32",
            enable_lora=True,
            max_lora_rank=8,
            enforce_eager=True,
            kv_cache_memory_bytes=16 << 20,
            max_model_len=64,
            max_num_seqs=2,
        )
        wanted = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
        (output,) = llm.generate([{"prompt_token_ids": ids}], wanted, lora_request=request)
    steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    found = torch.tensor([step[token].logprob for token, step in steps])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
