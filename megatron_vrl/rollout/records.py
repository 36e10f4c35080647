"""Stored rollouts: what a line of OUT/rollouts/*.jsonl.zst holds, and how to read them.

A line is a group, an append is a step of one rank (`storage/compressed.py`). Everything that an
answer was is in it, so that training can go on from the file alone (`rollout/replay.py`) and other
programs can read it; the frames of its video are not.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_vrl.errors import DataError
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.storage.compressed import frames
from megatron_vrl.types import Prompt, Rollout, ScoredGroup

PATTERN = "*.jsonl.zst"
Fate = Literal["kept", "uniform", "invalid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecord:
    token_ids: list[int]  # [R]
    logprobs: list[float | None]  # [R] under the engine, at the sampling temperature
    text: str
    finish: Literal["stop", "length"]
    seed: int
    weight_version: int  # of the weights that read the prompt
    newest_version: int  # of those of the last token
    components: dict[str, float | None]  # reward components; null: not a number
    reward: float | None  # total: the weighted sum of the components
    advantage: float | None  # null in a group that has a reward that is no number


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """A prompt's answers, as a line of the file."""

    step: int  # of GRPO, from 1
    version: int  # of the trainer's weights when the step began
    sample: str
    task: str
    fate: Fate  # kept: trained on; uniform: all advantages 0; invalid: a reward that is no number
    prompt_token_ids: list[int]  # with one pad for each video
    prompt_digest: str  # of tokens, positions and video files
    temperature: float
    top_p: float
    max_tokens: int
    answers: list[AnswerRecord]

    @property
    def seed(self) -> int:
        """With the sample's name it tells this group from all others of a run."""
        return self.answers[0].seed

    def rollouts(self) -> list[Rollout]:
        return [
            Rollout(
                token_ids=np.array(answer.token_ids, dtype=np.int64),
                logprobs=np.array(answer.logprobs, dtype=np.float32),
                text=answer.text,
                finish=answer.finish,
                weight_version=answer.weight_version,
                newest_version=answer.newest_version,
                seed=answer.seed,
            )
            for answer in self.answers
        ]


def record_of(
    group: ScoredGroup,
    advantages: NDArray[np.float64] | None,
    fate: Fate,
    spec: SamplingSpec,
    step: int,
    version: int,
) -> GroupRecord:
    """`advantages` [N], None for a group that has none."""
    total = group.total
    values = [None] * len(group.rollouts) if advantages is None else advantages.tolist()
    return GroupRecord(
        step=step,
        version=version,
        sample=group.sample.id,
        task=group.sample.task,
        fate=fate,
        prompt_token_ids=list(map(int, group.prompt.engine_token_ids)),
        prompt_digest=prompt_digest(group.prompt),
        temperature=spec.temperature,
        top_p=spec.top_p,
        max_tokens=spec.max_tokens,
        answers=[
            AnswerRecord(
                token_ids=rollout.token_ids.tolist(),
                logprobs=short_floats(rollout.logprobs),
                text=rollout.text,
                finish=rollout.finish,
                seed=rollout.seed,
                weight_version=rollout.weight_version,
                newest_version=rollout.newest_version,
                components={n: float(c.values[index]) for n, c in group.components.items()},
                reward=float(total[index]),
                advantage=values[index],
            )
            for index, rollout in enumerate(group.rollouts)
        ],
    )


def prompt_digest(prompt: Prompt) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in (prompt.token_ids, prompt.positions):
        digest.update(np.ascontiguousarray(array).data)
    for visual in prompt.visuals:
        digest.update(repr((visual.digest, visual.grid_thw)).encode())
    return digest.hexdigest()


def short_floats(values: NDArray[np.float32]) -> list[float | None]:
    """Of nine digits, which tell every two 32-bit floats apart: half the bytes of seventeen."""
    exact = values.astype(np.float64)
    with np.errstate(divide="ignore"):
        digits = np.where(exact == 0, 0, 8 - np.floor(np.log10(np.abs(exact))))
    scale = 10.0**digits
    rounded: list[float | None] = (np.round(exact * scale) / scale).tolist()
    return rounded


def encode(record: GroupRecord) -> bytes:
    return msgspec.json.encode(record)


def decode(line: bytes, path: Path) -> GroupRecord:
    """Raises DataError for a line that is no group."""
    try:
        return msgspec.json.decode(line, type=GroupRecord)
    except msgspec.DecodeError as error:
        raise DataError(f"{path} holds a line that is no group of rollouts: {error}.") from None


def files_of(directory: str | Path) -> list[Path]:
    """Raises DataError if there are none."""
    files = sorted(Path(directory).glob(PATTERN))
    if not files:
        raise DataError(f"{directory} holds no stored rollouts ({PATTERN}): give a run's rollouts.")
    return files


def read_rollouts(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Every stored group, file by file, as plain dictionaries (pandas.DataFrame takes them)."""
    for path in files_of(directory):
        for frame in frames(path, say):
            for line in frame.content.splitlines():
                yield msgspec.json.decode(line)


def say(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)
