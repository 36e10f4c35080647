"""Format of stored rollouts: OUT/rollouts/*.jsonl.zst.

A line is the group of one prompt as JSON, and an append is one step of one rank
(`storage/compressed.py`). A line holds everything about the rollouts, so that a run can train from
the files alone (`rollout/replay.py`) and other programs can read them. It does not hold the frames
of the video.
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
GroupStatus = Literal["kept", "zero_variance", "invalid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecord:
    """One rollout of a group."""

    token_ids: list[int]  # [R]
    logprobs: list[float | None]  # [R] under the engine, at the sampling temperature
    text: str
    finish: Literal["stop", "length"]
    seed: int
    weight_version: int  # of the weights that read the prompt
    newest_version: int  # of the weights that generated the last token
    components: dict[str, float | None]  # reward components; null: not a number
    reward: float | None  # total: the weighted sum of the components
    advantage: float | None  # null in an invalid group


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """All rollouts of one prompt: one line of the file."""

    step: int  # of GRPO, from 1
    version: int  # of the trainer's weights when the step began
    sample: str
    task: str
    status: GroupStatus  # kept: trained on; zero_variance: all advantages 0; invalid: a NaN reward
    prompt_token_ids: list[int]  # with one pad per video
    prompt_digest: str  # of tokens, positions and video files
    temperature: float
    top_p: float
    max_tokens: int
    answers: list[AnswerRecord]

    @property
    def seed(self) -> int:
        """Seed of the first rollout. Sample and seed identify a group within a run."""
        return self.answers[0].seed

    def rollouts(self) -> list[Rollout]:
        """Return the rollouts as the engine returned them."""
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
    status: GroupStatus,
    spec: SamplingSpec,
    step: int,
    version: int,
) -> GroupRecord:
    """Return the record of a group.

    advantages: [N], or None for an invalid group. step: of GRPO, from 1. version: of the trainer's
    weights when the step began.
    """
    total = group.total
    values = [None] * len(group.rollouts) if advantages is None else advantages.tolist()
    return GroupRecord(
        step=step,
        version=version,
        sample=group.sample.id,
        task=group.sample.task,
        status=status,
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
    """Return a digest of the prompt's tokens, positions, video files and grids."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (prompt.token_ids, prompt.positions):
        digest.update(np.ascontiguousarray(array).data)
    for visual in prompt.visuals:
        digest.update(repr((visual.digest, visual.grid_thw)).encode())
    return digest.hexdigest()


def short_floats(values: NDArray[np.float32]) -> list[float | None]:
    """Round to 9 significant digits, which round-trip float32 at half the JSON size of 17."""
    exact = values.astype(np.float64)
    with np.errstate(divide="ignore"):
        digits = np.where(exact == 0, 0, 8 - np.floor(np.log10(np.abs(exact))))
    scale = 10.0**digits
    rounded: list[float | None] = (np.round(exact * scale) / scale).tolist()
    return rounded


def encode(record: GroupRecord) -> bytes:
    """Return the record as a line of JSON without the line feed."""
    return msgspec.json.encode(record)


def decode(line: bytes, path: Path) -> GroupRecord:
    """Return the record of a line. Raises DataError if the line is not a group."""
    try:
        return msgspec.json.decode(line, type=GroupRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} holds a line that is not a group of rollouts: {error}.") from None


def files_of(directory: str | Path) -> list[Path]:
    """Return the rollout files of a directory, sorted. Raises DataError if there are none."""
    files = sorted(Path(directory).glob(PATTERN))
    if not files:
        raise DataError(
            f"{directory} holds no stored rollouts ({PATTERN}): name the rollouts of a run."
        )
    return files


def read_rollouts(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Yield every stored group as a plain dictionary, file by file.

    `pandas.DataFrame(read_rollouts(directory))` makes a table of them.
    """
    for path in files_of(directory):
        for frame in frames(path, warn):
            for line in frame.content.splitlines():
                yield msgspec.json.decode(line)


def warn(sentence: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {sentence}", file=sys.stderr)
