"""Tokens a second of the rollout engine on a random model of the given sizes.

A round has --prompts text prompts with --group answers each, of at most --answer-tokens; random
weights seldom stop earlier. One round warms up."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.sync import checkpoint_of

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=1024, help="size of the language model")
    parser.add_argument("--layers", type=int, default=10, help="size of the language model")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a round")
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="length of a prompt")
    parser.add_argument("--answer-tokens", type=int, default=64, help="length of an answer")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    import numpy as np

    from megatron_vrl.config import RolloutConfig
    from megatron_vrl.rollout.request import SamplingSpec
    from megatron_vrl.rollout.vllm.engine import VllmEngine
    from megatron_vrl.types import Prompt

    count = arguments.prompt_tokens
    rng = np.random.default_rng(0)
    prompts = []
    for number in range(arguments.prompts):
        ids = rng.integers(10, 200, count)
        positions = np.tile(np.arange(count), (3, 1))
        prompts.append(
            Prompt(
                id=f"bench-{number}",
                visuals=(),
                token_ids=ids,
                engine_token_ids=tuple(ids.tolist()),
                positions=positions,
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        hf = checkpoint_of(Path(folder) / "hf", arguments.hidden, arguments.layers)
        cfg = RolloutConfig(max_num_seqs=arguments.prompts * arguments.group)
        longest = count + arguments.answer_tokens
        engine = VllmEngine(str(hf), cfg, dtype=arguments.dtype, seed=1, max_model_len=longest)
        rates, tokens = [], 0
        for number in range(1 + arguments.rounds):
            spec = SamplingSpec(
                n=arguments.group,
                temperature=1.0,
                top_p=1.0,
                max_tokens=arguments.answer_tokens,
                seed=number,
            )
            began = time.perf_counter()
            answers = engine.generate(prompts, spec)
            spent = time.perf_counter() - began
            tokens = sum(len(answer.token_ids) for group in answers for answer in group)
            if number > 0:
                rates.append(tokens / spent)
    yield {
        "bench": "generate",
        "hidden": arguments.hidden,
        "layers": arguments.layers,
        "answers": f"{arguments.prompts}x{arguments.group}",
        "tokens": tokens,
        "tokens_per_s": statistics.median(rates),
    }
