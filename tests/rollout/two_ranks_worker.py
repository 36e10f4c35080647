"""Started by torchrun: engines beside Megatron's groups, ranks out of step on purpose."""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_vrl import config
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.engine import VllmEngine
from tests.rollout.conftest import MAX_MODEL_LEN, prompt_maker
from tests.tiny import sharded_tensors


def groups_work() -> bool:
    ones = torch.ones(2)
    torch.distributed.all_reduce(ones[:1])
    torch.distributed.all_reduce(ones[1:], group=parallel_state.get_tensor_model_parallel_group())
    return ones.tolist() == [2.0, 2.0]


def main(checkpoint: Path) -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    rank = torch.distributed.get_rank()
    cfg = config.RolloutConfig(max_num_seqs=16, kv_cache_mib=64)
    engine = VllmEngine(str(checkpoint), cfg, dtype="float32", seed=1, max_model_len=MAX_MODEL_LEN)
    make_prompt = prompt_maker(checkpoint)
    weights = sharded_tensors(checkpoint)
    spec = SamplingSpec(n=2, temperature=1.0, top_p=1.0, max_tokens=8, seed=5)
    for version in range(1 + 2 * rank):
        engine.push_weights(weights.items(), version)
        engine.generate([make_prompt(seed) for seed in range(1 + rank)], spec)
    assert groups_work()
    [group] = engine.generate([make_prompt(9)], spec)
    answers: list[list[list[int]] | None] = [None, None]
    torch.distributed.all_gather_object(answers, [r.token_ids.tolist() for r in group])
    assert answers[0] == answers[1]  # same weights, prompt and seed, whatever came before
    del engine
    assert groups_work()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    print(f"rank {rank} finished\n", end="")


main(Path(sys.argv[1]))
