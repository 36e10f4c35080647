"""Select training data: several answers to every sample of a pool, then rules on their rewards.

OUT/answers-I.jsonl has every raw answer with its reward components, a line for each sample, written
a block at a time, so that stopped work goes on and gives what it would have given. From these files
alone come OUT/stats.jsonl (means, spreads and verdict of every sample), OUT/kept.jsonl (for
data.selection), OUT/summary.json and OUT/report.html: other rules cost no inference. The pool may
be shared out over several processes, each with its own I. The same inside a run, between epochs,
is megatron_vrl/trainer/reselect.py.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vrl.config import RunConfig, Selection
from megatron_vrl.data.mix import open_pool
from megatron_vrl.errors import DataError, VideoError
from megatron_vrl.evaluation.generate import Answerer, InferenceConfig
from megatron_vrl.evaluation.predict import check_settings, check_videos, readable
from megatron_vrl.observe.progress import progress_bar
from megatron_vrl.observe.selection_report import selection_report
from megatron_vrl.process.entry import told_if_interrupted
from megatron_vrl.process.run_lock import check_owned
from megatron_vrl.rewards.manager import RewardManager
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.rollout.request import SamplingSpec
from megatron_vrl.selection.rules import KEPT, Candidate, candidate, select
from megatron_vrl.storage.files import full_disk_named, kept_rows, read_rows, write_file
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Rollout, VideoSample
from megatron_vrl.video import VideoReader

BLOCK = 32  # samples answered by one call of the engine and written at once
Share = tuple[int, int]  # (which, of how many)
Row = dict[str, Any]


def pool(cfg: RunConfig) -> list[VideoSample]:
    """The samples of data.train, whose ids are those of the training run."""
    drawn = open_pool(cfg.data.train, cfg.run.seed, VideoReader(cfg.video).duration_s)
    return [sample for sample in drawn if isinstance(sample, VideoSample)]


def collect_answers(
    cfg: RunConfig,
    samples: Sequence[VideoSample],
    out: Path,
    share: Share = (0, 1),
    start: Callable[[InferenceConfig, int], Answerer] = Answerer,
) -> None:
    """Answer this share of the pool, as far as `out` does not have it.

    A block with a video that could not be read and now can is answered anew. Raises UserError,
    before an engine starts if no video of the pool is there.
    """
    check_videos(samples, "the data_folder of the pool")
    out.mkdir(parents=True, exist_ok=True)
    which, of = share
    check_settings(out / f"settings-{which}.json", _settings(cfg, share))
    path = out / f"answers-{which}.jsonl"
    blocks = [samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK)]
    mine = list(range(which, len(blocks), of))
    rows = {row["id"]: row for row in read_rows(path)}
    bad = [s for s in samples if rows.get(s.id, {}).get("problem")]
    again = readable(cfg.video, bad)
    whole = [n for n in mine if all(s.id in rows and s.id not in again for s in blocks[n])]
    kept = [rows[sample.id] for number in whole for sample in blocks[number]]
    write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
    left = [number for number in mine if number not in set(whole)]
    if not left:
        return
    total = sum(len(blocks[number]) for number in mine)
    with (
        told_if_interrupted(lambda: kept_rows(path, total, "sample")),
        closing(RewardManager(cfg.rewards)) as judge,
        path.open("a", encoding="utf-8") as file,
        progress_bar("select", total, "samples", len(kept)) as bar,
    ):
        answerer = start(_inference(cfg), cfg.rollout.max_response_tokens)
        for number in left:
            lines = list(_answered(cfg, blocks[number], number, answerer, judge))
            check_owned(out)
            with full_disk_named(path):
                file.write("".join(json.dumps(row) + "\n" for row in lines))
                file.flush()
            bar.update(len(lines))


def apply_rules(cfg: RunConfig, samples: Sequence[VideoSample], out: Path) -> list[Candidate]:
    """Verdicts on every sample of the pool that has answers, written to `out`.

    Raises DataError if there are no answers.
    """
    rows = {
        row["id"]: row for path in sorted(out.glob("answers-*.jsonl")) for row in read_rows(path)
    }
    weights = reward_weights(cfg.rewards)
    found = [
        candidate(sample.id, sample.task, rows[sample.id]["answers"], weights[sample.task])
        for sample in samples
        if sample.id in rows
    ]
    if not found:
        raise DataError(
            f"{out} has no answers to the samples of data.train; leave out --rules-only."
        )
    chosen = select(found, cfg.selection)
    write_selection(out, chosen, len(samples), cfg.selection)
    return chosen


def write_selection(
    out: Path, chosen: Sequence[Candidate], pool_size: int, rule: Selection
) -> None:
    """stats.jsonl, kept.jsonl, summary.json and report.html."""
    kept = sorted((c for c in chosen if c.verdict == KEPT), key=lambda c: -c.rank)
    _write_rows(out / "stats.jsonl", [c.row() for c in chosen])
    _write_rows(out / "kept.jsonl", [{"id": c.id, "task": c.task, "rank": c.rank} for c in kept])
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
    block: Sequence[VideoSample],
    number: int,
    answerer: Answerer,
    judge: RewardManager,
) -> Iterator[Row]:
    entropy = np.random.SeedSequence([cfg.run.seed, number])
    spec = SamplingSpec(
        n=cfg.selection.answers,
        temperature=cfg.selection.temperature,
        top_p=cfg.rollout.top_p,
        max_tokens=cfg.rollout.max_response_tokens,
        seed=int(entropy.generate_state(1)[0] >> 1),
    )
    began = time.perf_counter()
    for sample, answers in answerer.answer(block, spec, len(block)):
        row: Row = {"id": sample.id, "task": sample.task, "seed": spec.seed}
        if isinstance(answers, VideoError):
            yield row | {"problem": str(answers), "answers": []}
            continue
        seconds = round(time.perf_counter() - began, 3)
        yield row | {"seconds_into_block": seconds, "answers": judged(judge, sample, answers)}


def judged(judge: RewardManager, sample: VideoSample, rollouts: Sequence[Rollout]) -> list[Row]:
    """What is kept of each answer. Raises DataError if a function of the user's cannot grade it."""
    components = judge.components(sample, rollouts)
    for name, failed in judge.take_failures().items():
        raise DataError(f"The reward function {name!r} {failed[0]}: correct it and go on.")
    return [_row(sample, *pair) for pair in zip(rollouts, components, strict=True)]


def _row(sample: VideoSample, rollout: Rollout, components: dict[str, float]) -> Row:
    parsed = TASKS[sample.task].parse(rollout.text, sample)
    return {
        "text": rollout.text,
        "finish": rollout.finish,
        "tokens": len(rollout.token_ids),
        "interval_s": parsed.interval_s,
        "option": parsed.option or None,
        "failure": parsed.failure or None,
        "components": components,
    }


def _inference(cfg: RunConfig) -> InferenceConfig:
    return InferenceConfig(
        model=cfg.model,
        video=cfg.video,
        data=cfg.data,
        rollout=cfg.rollout,
        evaluation=cfg.evaluation,
    )


def _settings(cfg: RunConfig, share: Share) -> dict[str, Any]:
    """What the answers depend on; the rules are not among it."""
    data = cfg.data.model_dump(
        mode="json", include={"train", "system_prompt", "question", "max_prompt_tokens"}
    )
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
        "share": list(share),
    }


def _counts(chosen: Sequence[Candidate]) -> dict[str, dict[str, int]]:
    """task -> verdict -> samples."""
    found: dict[str, Counter[str]] = {}
    for one in chosen:
        found.setdefault(one.task, Counter())[one.verdict] += 1
    return {task: dict(of_task.most_common()) for task, of_task in sorted(found.items())}


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_file(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
