"""Print the log-probs of a text that vLLM computes with a PEFT adapter in a LoRA slot, as JSON.

    adapter_in_vllm.py CHECKPOINT ADAPTER TOKEN_IDS

It runs in a process of its own: stock vLLM ends its process groups with its engine, and with them
those of every other engine of the process.
"""

import json
import sys
from typing import Any

import torch

from megatron_vrl.rollout.vllm.startup import import_vllm


def main() -> None:
    checkpoint, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    vllm: Any = import_vllm()
    from vllm.lora.request import LoRARequest

    with torch.compiler.set_stance("force_eager"):
        llm = vllm.LLM(
            checkpoint,
            dtype="float32",
            enable_lora=True,
            max_lora_rank=8,
            enforce_eager=True,
            kv_cache_memory_bytes=16 << 20,
            max_model_len=64,
            max_num_seqs=2,
        )
        wanted = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        request = LoRARequest("adapter", 1, adapter)
        (output,) = llm.generate([{"prompt_token_ids": ids}], wanted, lora_request=request)
    steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    print(json.dumps([step[token].logprob for token, step in steps]))


if __name__ == "__main__":
    main()
