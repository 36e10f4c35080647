"""Parsers of input that others may have written, each as a function of bytes.

A target accepts any bytes. It may end with the program's own error, which is one sentence; every
other exception is a finding. Invariants of a result are asserted.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_vrl.config import Rewards, Source, load_config
from megatron_vrl.data.formats.training import READERS, read_whole
from megatron_vrl.errors import DataError, UserError
from megatron_vrl.evaluation.grading import Grader
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.rollout import records
from megatron_vrl.rollout.buckets import WeightBucket
from megatron_vrl.rollout.request import RolloutRequest, SamplingSpec
from megatron_vrl.rollout.workers import protocol
from megatron_vrl.storage.hf_files import read_headers
from megatron_vrl.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-"))
ANSWERS = (
    b'<think>it starts</think><answer>{"start_time": "3.0", "end_time": "7.5"}</answer>',
    b'<think></think><answer>{"intervals": [[1, 2], [3.5, 4]]}</answer>',
    b'<answer>{"answer": "B", "start_time": 3, "end_time": "7"}</answer>',
    b"The answer is D. small dog, from 00:03 to 00:07.5.",
)
LINE = {
    "id": "clip/0",
    "duration_s": 16.0,
    "intervals_s": [[3.0, 7.0]],
    "option": "B",
    "options": ["a red square", "a blue dog"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One parser."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]  # valid inputs, which the fuzzer changes


def answers(data: bytes) -> None:
    """Grade the text as an answer to a question of every task; scores lie in [0, 1]."""
    response = data.decode("utf-8", "replace")
    for task in GRADERS:
        with suppress(DataError):  # a task with a truth of its own
            row = GRADERS[task].grade({**LINE, "response": response})
            assert 0.0 <= row["score"] <= 1.0
            assert all(0.0 <= value <= 1.0 for value in row["parts"].values())
            json.dumps(row, allow_nan=False)


def reward_input(data: bytes) -> None:
    """Grade a line of `mvrl grade`."""
    with suppress(ValueError, RecursionError):  # not JSON
        fields = json.loads(data)
        for grader in GRADERS.values():
            with suppress(UserError):
                json.dumps(grader.grade(fields), allow_nan=False)


def annotations(data: bytes) -> None:
    """Read an annotation file in every format of training."""
    path = SCRATCH / "annotations.json"
    path.write_bytes(data)
    for name in READERS:
        with suppress(UserError):
            read_whole(_source(path, name))


def config(data: bytes) -> None:
    """Load a YAML config."""
    path = SCRATCH / "config.yaml"
    path.write_bytes(data)
    with suppress(UserError):
        load_config(path)


def worker_messages(data: bytes) -> None:
    """Decode a message to a rollout worker or from it, as every type."""
    for kind in MESSAGES:
        with suppress(protocol.InvalidMessage, UserError):  # the server answers both with 422
            protocol.decode(data, kind)


def stored_rollouts(data: bytes) -> None:
    """Decode a line of a stored rollout."""
    with suppress(UserError):
        records.decode(data, Path("rollouts"))


def model_config(data: bytes) -> None:
    """Read config.json of a checkpoint."""
    path = SCRATCH / "config.json"
    path.write_bytes(data)
    with suppress(UserError):
        read_architecture(path)


def safetensors_header(data: bytes) -> None:
    """Read the header of model.safetensors."""
    folder = SCRATCH / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    with suppress(UserError):
        read_headers(folder)


def _source(path: Path, name: str) -> Source:
    fields: Mapping[str, Any] = {"json_path": str(path), "data_folder": "/data", "format": name}
    return Source.model_validate(fields)


def _example(name: str) -> bytes:
    return (ROOT / name).read_bytes()


def _message() -> bytes:
    request = RolloutRequest(
        id="clip/0", token_ids=np.arange(3), engine_token_ids=(1, 2), visuals=()
    )
    spec = SamplingSpec.greedy(8)
    return protocol.encode(protocol.GenerateRequest(request=request, spec=spec, version=1))


def _safetensors() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return len(header).to_bytes(8, "little") + header + bytes(8)


MESSAGES: tuple[type[Any], ...] = (
    protocol.GenerateRequest,
    protocol.GenerateResponse,
    protocol.LoadBucket,
    protocol.CommitWeights,
    WeightBucket,
)
GRADERS = {
    name: Grader(task=name, mode="strict", weights=weights)
    for name, weights in reward_weights(Rewards()).items()
    if name in TASKS
}
GENERIC = [
    {"id": "a", "task": "temporal_grounding", "video": "a.mp4", "duration": 16.0}
    | {"question": "the dog runs", "intervals": [[3.0, 7.0]]}
]
ROLLOUT = {"version": 1, "phase": "grpo", "step": 1, "sample": "a", "answers": []}
TARGETS = {
    "answers": Target(run=answers, seeds=ANSWERS),
    "reward_input": Target(
        run=reward_input, seeds=(json.dumps({**LINE, "response": "B"}).encode(),)
    ),
    "annotations": Target(
        run=annotations,
        seeds=(
            _example("configs/annotations/real_clips.json"),
            json.dumps(GENERIC).encode(),
        ),
    ),
    "config": Target(run=config, seeds=(_example("configs/quickstart.yaml"),)),
    "worker_messages": Target(
        run=worker_messages, seeds=(_message(), msgspec.msgpack.encode({"version": 1}))
    ),
    "stored_rollouts": Target(run=stored_rollouts, seeds=(json.dumps(ROLLOUT).encode(),)),
    "model_config": Target(
        run=model_config,
        seeds=(
            _example("configs/models/qwen2.5-vl-3b.json"),
            _example("configs/models/qwen3-vl-8b.json"),
        ),
    ),
    "safetensors_header": Target(run=safetensors_header, seeds=(_safetensors(),)),
}
