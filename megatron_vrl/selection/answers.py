"""Answers to the samples of a pool: rows of answers-I.jsonl, written and resumed in blocks.

The tool (`select.py`) and a run between two epochs (`trainer/reselect.py`) write the same rows by
the same rules. A block of samples is answered by one call of the engine, and its rows are appended
together. States of a block in the file:

    MISSING   no row, or some rows of a process that was killed while it wrote
    COMPLETE  a row for every sample

`resume` keeps the rows of complete blocks and drops the others: the rest of a block would be
another batch, which the engine's kernels may round differently. Example with blocks of 4 and 6 rows
in the file: the first block is kept, rows 5 and 6 are dropped, and the second block is answered
again as a whole, with the seeds it had.
"""

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vrl.config import RunConfig
from megatron_vrl.errors import DataError, VideoError
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.selection.rules import Candidate, candidate
from megatron_vrl.storage.files import read_rows, write_file
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Rollout, Sample

Row = dict[str, Any]


def sampling_spec(cfg: RunConfig, *entropy: int) -> SamplingSpec:
    """Return how answers are sampled; the seed comes from run.seed and `entropy`."""
    sequence = np.random.SeedSequence([cfg.run.seed, *entropy])
    return SamplingSpec(
        n=cfg.selection.answers,
        temperature=cfg.selection.temperature,
        top_p=cfg.rollout.top_p,
        max_tokens=cfg.rollout.max_response_tokens,
        seed=int(sequence.generate_state(1)[0] >> 1),
    )


def answer_row(
    sample: Sample,
    answers: Sequence[Rollout] | VideoError,
    spec: SamplingSpec,
    reward_manager: RewardManager,
    measured: Mapping[str, float] | None = None,
) -> Row:
    """Return the row of a sample, with every answer and its reward components, ready for JSON.

    A VideoError stands for the answers to a video that cannot be read. `measured`: more fields.
    Raises DataError if a user's reward function cannot grade an answer.
    """
    row: Row = {"id": sample.id, "task": sample.task, "seed": spec.seed}
    row["duration_s"] = sample.duration_s
    if isinstance(answers, VideoError):
        return row | {"problem": str(answers), "answers": []}
    components = reward_manager.components(sample, answers)
    for name, failed in reward_manager.take_failures().items():
        raise DataError(f"The reward function {name!r} {failed[0]}: correct it and go on.")
    graded = [_answer(sample, *pair) for pair in zip(answers, components, strict=True)]
    return row | dict(measured or {}) | {"answers": graded}


def _answer(sample: Sample, rollout: Rollout, components: dict[str, float]) -> Row:
    """Return the fields of one answer."""
    parsed = TASKS[sample.task].parse(rollout.text, sample)
    return {
        "text": rollout.text,
        "finish": rollout.finish,
        "tokens": len(rollout.token_ids),
        "interval_s": parsed.interval_s,
        **({"intervals_s": parsed.intervals_s} if parsed.intervals_s else {}),
        "option": parsed.option or None,
        "failure": parsed.failure or None,
        "components": components,
    }


def resume(
    path: Path, blocks: Sequence[Sequence[str]], stale: Set[str] = frozenset()
) -> dict[str, Row]:
    """Return the rows of complete blocks by sample id, and drop all other rows from the file.

    `blocks`: sample ids. `stale`: samples that must be answered again, with their blocks.
    """
    rows = {row["id"]: row for row in read_rows(path)}
    complete = [block for block in blocks if all(n in rows and n not in stale for n in block)]
    kept = {name: rows[name] for block in complete for name in block}
    write_file(path, json_lines(kept.values()))
    return kept


def json_lines(rows: Iterable[Row]) -> str:
    """Return the rows as lines of JSON."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def candidates_of(
    rows: Iterable[Row], weights: Mapping[str, Mapping[str, float]]
) -> list[Candidate]:
    """Return the statistics of each row's answers. `weights`: task -> component -> weight."""
    return [
        candidate(
            row["id"], row["task"], row["answers"], weights[row["task"]], row.get("duration_s")
        )
        for row in rows
    ]
