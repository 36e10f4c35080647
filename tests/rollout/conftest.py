"""Fixtures of the rollout tests: one tiny checkpoint and one engine for all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_vrl import config
from megatron_vrl.rollout.vllm.engine import VllmEngine
from megatron_vrl.types import Prompt
from tests.tiny import sharded_tensors, video

MAX_MODEL_LEN = 256
Weights = dict[str, torch.Tensor]  # of a checkpoint, by Hugging Face name
MakePrompt = Callable[..., Prompt]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_tiny_model

    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_tiny_model.main(["--out", str(directory)])
    return directory


@pytest.fixture(scope="session")
def weights(checkpoint: Path) -> Weights:
    """Tensors of the checkpoint by HF name."""
    return sharded_tensors(checkpoint)


@pytest.fixture(scope="session")
def shared_engine(checkpoint: Path) -> VllmEngine:
    from megatron_vrl.rollout.vllm.engine import VllmEngine

    cfg = config.RolloutConfig(max_num_seqs=64, kv_cache_mib=64)
    return VllmEngine(str(checkpoint), cfg, dtype="float32", seed=1, max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def engine(shared_engine: VllmEngine, weights: Weights) -> VllmEngine:
    """Engine with the weights of the checkpoint."""
    shared_engine.push_weights(weights.items(), version=1)
    return shared_engine


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def make_prompt(checkpoint: Path) -> MakePrompt:
    return prompt_maker(checkpoint)


def prompt_maker(checkpoint: Path) -> MakePrompt:
    """Return make_prompt(seed, grid_thw, seconds_per_grid) -> Prompt of noise; no positions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def make(
        seed: int, grid_thw: tuple[int, int, int] = (4, 6, 8), seconds_per_grid: float = 0.7
    ) -> Prompt:
        steps, height, width = grid_thw
        head = tokenizer.encode("<|im_start|>user\n<|vision_start|>")
        tail = tokenizer.encode(f"<|vision_end|>clip {seed}<|im_end|>\n<|im_start|>assistant\n")
        pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        assert isinstance(pad, int)
        token_ids = np.array(head + [pad] * (steps * height * width // 4) + tail)
        return Prompt(
            id=f"clip_{seed}",
            visuals=(video(grid_thw, seconds_per_grid, seed),),
            token_ids=token_ids,
            engine_token_ids=(*head, pad, *tail),
            positions=np.zeros((3, len(token_ids)), dtype=np.int64),
        )

    return make
