"""Tensor-parallel engine of two processes: prints its tokens and weight checksums as JSON."""

import json
import sys
from pathlib import Path

from megatron_vrl import config
from megatron_vrl.rollout.buckets import BucketWriter
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.rollout.vllm.engine import VllmEngine
from tests.rollout.conftest import MAX_MODEL_LEN, prompt_maker
from tests.tiny import sharded_tensors

SPEC = SamplingSpec(n=4, temperature=1.0, top_p=1.0, max_tokens=16, seed=3)


def main(checkpoint: Path, factor: float) -> None:
    engine = VllmEngine(
        str(checkpoint),
        config.RolloutConfig(max_num_seqs=16, kv_cache_mib=64),
        dtype="float32",
        seed=1,
        max_model_len=MAX_MODEL_LEN,
        tensor=2,
    )
    weights = sharded_tensors(checkpoint)
    writer = BucketWriter(engine.dtype)
    for version, scale in enumerate((1.0, factor)):
        engine.start_update()
        engine.load(writer.write((name, tensor * scale) for name, tensor in weights.items()))
        engine.finish_update(version)
    make_prompt = prompt_maker(checkpoint)
    groups = engine.generate([make_prompt(0), make_prompt(1)], SPEC)
    found = {
        "tokens": [[rollout.token_ids.tolist() for rollout in group] for group in groups],
        "checksums": engine.weights_checksum(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
