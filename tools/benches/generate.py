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
    from megatron_vrl.rollout.request import SamplingSpec

    prompts = _prompts(arguments.prompts, arguments.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(Path(folder) / "hf", arguments)
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


def _prompts(num_prompts: int, num_tokens: int) -> list[Any]:
    """Return text prompts of random tokens."""
    import numpy as np

    from megatron_vrl.types import Prompt

    rng = np.random.default_rng(0)
    prompts = []
    for number in range(num_prompts):
        ids = rng.integers(10, 200, num_tokens)
        positions = np.tile(np.arange(num_tokens), (3, 1))
        prompts.append(
            Prompt(
                id=f"bench-{number}",
                visuals=(),
                token_ids=ids,
                engine_token_ids=tuple(ids.tolist()),
                positions=positions,
            )
        )
    return prompts


def _engine(folder: Path, arguments: argparse.Namespace) -> Any:
    """Return an engine that holds the random weights of a checkpoint, which is written first."""
    from megatron_vrl.checkpoint.hf_reader import HFCheckpoint
    from megatron_vrl.config import RolloutConfig
    from megatron_vrl.models.architecture import read_architecture
    from megatron_vrl.models.weight_map import hf_shapes
    from megatron_vrl.rollout.vllm.engine import VllmEngine

    hf = checkpoint_of(folder, arguments.hidden, arguments.layers)
    arch = read_architecture(hf)
    stored = HFCheckpoint(hf, arch)
    cfg = RolloutConfig(max_num_seqs=arguments.prompts * arguments.group)
    longest = arguments.prompt_tokens + arguments.answer_tokens
    engine = VllmEngine(str(hf), cfg, dtype=arguments.dtype, seed=1, max_model_len=longest)
    engine.push_weights(((name, stored.tensor(name)) for name in hf_shapes(arch)), version=0)
    return engine
