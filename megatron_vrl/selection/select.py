"""Select training data with a checkpoint: answer every sample of a pool, then apply the rules.

| file in OUT | content |
|-|-|
| answers-I.jsonl | a row for each sample with every answer and its reward components |
| stats.jsonl | mean, standard deviation, verdict and rank of each sample |
| kept.jsonl | the kept samples, for data.selection |
| summary.json, report.html | counts and plots |

Answers are written block by block, and a stopped call resumes with the same answers (`answers.py`).
The other files are made from the answers alone, so other rules need no inference. Several processes
can answer one pool, each its shard I of N. A run selects between epochs by the same rules and files
(`trainer/reselect.py`).
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_vrl.checkpoint.layout import hf_dir_of, pixels_of
from megatron_vrl.config import RunConfig, Selection
from megatron_vrl.context import media_reader
from megatron_vrl.data.media_limits import limits_of
from megatron_vrl.data.mix import open_pool
from megatron_vrl.errors import DataError
from megatron_vrl.evaluation.generate import Answerer, InferenceConfig
from megatron_vrl.evaluation.predict import check_settings, check_videos, readable
from megatron_vrl.observe.progress import progress_bar
from megatron_vrl.observe.selection_report import selection_report
from megatron_vrl.process.entry import told_if_interrupted
from megatron_vrl.process.run_lock import check_owned
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.selection.answers import (
    Row,
    answer_row,
    candidates_of,
    json_lines,
    resume,
    sampling_spec,
)
from megatron_vrl.selection.rules import KEPT, Candidate, check_budget, select
from megatron_vrl.storage.files import full_disk_named, kept_rows, read_rows, write_file
from megatron_vrl.types import Sample

BLOCK = 32  # samples answered by one call of the engine and written at once
Shard = tuple[int, int]  # (which, of how many)


def pool(cfg: RunConfig) -> list[Sample]:
    """Return the samples of data.train, with the ids that the training run gives them."""
    checkpoint = cfg.model.checkpoint
    reader = media_reader(cfg.video, cfg.data, pixels_of(checkpoint), hf_dir_of(checkpoint))
    drawn = open_pool(cfg.data.train, cfg.run.seed, reader.duration_s, limits_of(cfg.data))
    return [sample for sample in drawn if isinstance(sample, Sample)]


def collect_answers(
    cfg: RunConfig,
    samples: Sequence[Sample],
    out: Path,
    shard: Shard = (0, 1),
    start: Callable[[InferenceConfig, int], Answerer] = Answerer,
) -> None:
    """Answer the blocks of this shard of the pool that `out` does not have.

    A block with a video that could not be read and can be read now is answered again. Raises
    UserError, before an engine starts if no video of the pool exists.
    """
    check_budget(cfg.selection)
    check_videos(samples, "the data_folder of the pool")
    out.mkdir(parents=True, exist_ok=True)
    which, of = shard
    check_settings(out / f"settings-{which}.json", _settings(cfg, shard))
    path = out / f"answers-{which}.jsonl"
    blocks = [samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK)]
    mine = list(range(which, len(blocks), of))
    failed = {row["id"] for row in read_rows(path) if row.get("problem")}
    again = readable(cfg, [sample for sample in samples if sample.id in failed])
    kept = resume(path, [[sample.id for sample in blocks[n]] for n in mine], again)
    left = [number for number in mine if blocks[number][0].id not in kept]
    if not left:
        return
    total = sum(len(blocks[number]) for number in mine)
    with (
        told_if_interrupted(lambda: kept_rows(path, total, "sample")),
        closing(RewardManager(cfg.rewards)) as reward_manager,
        path.open("a", encoding="utf-8") as file,
        progress_bar("select", total, "samples", len(kept)) as bar,
    ):
        answerer = start(_inference(cfg), cfg.rollout.max_response_tokens)
        for number in left:
            rows = list(_answered(cfg, blocks[number], number, answerer, reward_manager))
            check_owned(out)
            with full_disk_named(path):
                file.write(json_lines(rows))
                file.flush()
            bar.update(len(rows))


def apply_rules(cfg: RunConfig, samples: Sequence[Sample], out: Path) -> list[Candidate]:
    """Return the verdict on every sample of the pool that has answers, and write `out`'s files.

    Raises DataError if there are no answers.
    """
    rows = {
        row["id"]: row for path in sorted(out.glob("answers-*.jsonl")) for row in read_rows(path)
    }
    candidates = candidates_of(
        (rows[s.id] for s in samples if s.id in rows), reward_weights(cfg.rewards)
    )
    if not candidates:
        raise DataError(
            f"{out} has no answers to the samples of data.train; leave out --rules-only."
        )
    chosen = select(candidates, cfg.selection, [cfg.run.seed])
    write_selection(out, chosen, len(samples), cfg.selection)
    return chosen


def write_selection(
    out: Path, chosen: Sequence[Candidate], pool_size: int, rule: Selection
) -> None:
    """Write stats.jsonl, kept.jsonl, summary.json and report.html."""
    kept = sorted((c for c in chosen if c.verdict == KEPT), key=lambda c: -c.rank)
    write_file(out / "stats.jsonl", json_lines(c.row() for c in chosen))
    rows = ({"id": c.id, "task": c.task, "rank": c.rank} for c in kept)
    write_file(out / "kept.jsonl", json_lines(rows))
    summary = {
        "pool": pool_size,
        "answered": len(chosen),
        "kept": len(kept),
        "rules": rule.model_dump(),
        "verdicts": _counts(chosen),
    }
    write_file(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_file(out / "report.html", selection_report(summary, [c.row() for c in chosen]))


def _answered(
    cfg: RunConfig,
    block: Sequence[Sample],
    number: int,
    answerer: Answerer,
    reward_manager: RewardManager,
) -> Iterator[Row]:
    """Yield the rows of block `number`, with the seconds since the block began."""
    spec = sampling_spec(cfg, number)
    began = time.perf_counter()
    for sample, answers in answerer.answer(block, spec, len(block)):
        measured = {"seconds_into_block": round(time.perf_counter() - began, 3)}
        yield answer_row(sample, answers, spec, reward_manager, measured)


def _inference(cfg: RunConfig) -> InferenceConfig:
    return InferenceConfig(
        model=cfg.model,
        video=cfg.video,
        data=cfg.data,
        rollout=cfg.rollout,
        evaluation=cfg.evaluation,
    )


def _settings(cfg: RunConfig, shard: Shard) -> dict[str, Any]:
    """Return the settings that the answers depend on. The rules are not among them."""
    keys = {"train", "system_prompt", "question", "timestamps", "max_prompt_tokens"}
    data = cfg.data.model_dump(mode="json", include=keys)
    return {
        "seed": cfg.run.seed,
        "checkpoint": cfg.model.checkpoint,
        "data": data,
        "video": cfg.video.model_dump(mode="json", include={"fps", "total_pixels", "max_pixels"}),
        "answers": cfg.selection.answers,
        "temperature": cfg.selection.temperature,
        "top_p": cfg.rollout.top_p,
        "max_response_tokens": cfg.rollout.max_response_tokens,
        "rewards": cfg.rewards.model_dump(mode="json", include={"mode", "functions"}),
        "shard": list(shard),
    }


def _counts(chosen: Sequence[Candidate]) -> dict[str, dict[str, int]]:
    """Return task -> verdict -> number of samples."""
    counts: dict[str, Counter[str]] = {}
    for one in chosen:
        counts.setdefault(one.task, Counter())[one.verdict] += 1
    return {task: dict(of_task.most_common()) for task, of_task in sorted(counts.items())}
