"""Arms of the comparison: the jobs of each, their settings and their results.

Budgets of steps, with the measured seconds of a step of SFT (s) and of GRPO (g):

    sft_grpo         170 steps of SFT, 90 of GRPO          170 s + 90 g seconds
    more_sft         (170 s + 90 g) / s steps of SFT       as many seconds
    grpo             (170 s + 90 g) / g steps of GRPO      as many seconds
    sft_updates, grpo_kl                                   as many steps as `grpo`

A finished arm has a record, OUT/records/CONDITION/seed-N/ARM.json. Finished jobs are reused. A job
whose settings have changed since is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_vrl.storage.files import write_file
from studies.jobs import CONFIG, Launcher, dev_curve, step_seconds
from studies.pools import common_data, kept_clips, label_quality, labelled, pool_clips, write_pool
from studies.settings import (
    ANNOTATION,
    CONDITIONS,
    DEV_EVALUATIONS,
    GRPO,
    KL,
    SELECTION,
    SFT,
    SFT_RATES,
    SHORT_SFT_RATE,
    TUNING_SEED,
)

Record = dict[str, Any]
Sources = list[dict[str, str]]


def equal_steps(budget: Mapping[str, int], seconds: Mapping[str, float], kind: str) -> int:
    """Return the number of steps of `kind` that take as long as the steps in `budget`."""
    total = sum(count * seconds[name] for name, count in budget.items())
    return max(1, round(total / seconds[kind]))


def with_evaluations(steps: int) -> tuple[int, int]:
    """Return (steps, steps between evaluations): the last step is evaluated, too.

    Example: 674 steps become 670, evaluated every 67.
    """
    every = max(1, round(steps / DEV_EVALUATIONS))
    return every * max(1, round(steps / every)), every


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    launcher: Launcher
    num: int  # clips of the quickstart's set
    objects: int  # shapes in a clip
    budget: Mapping[str, int]  # steps of the arm `sft_grpo`: {"sft", "grpo"}

    @property
    def out(self) -> Path:
        return self.launcher.out

    def folder(self, condition: str, seed: int) -> Path:
        return self.out / "jobs" / condition / f"seed-{seed}"


# ---- what all arms start from


def cold_start(study: Study, seed: int) -> Path:
    """Return the finished job of the quickstart's warm-up, which stops early."""
    home = study.folder("cold", seed)
    model = home / "model-hf"
    if not (model / "config.json").exists():
        study.launcher.tool("make_tiny_model.py", "--out", model, "--seed", seed)
    data = common_data(study.out)
    start = {
        "model.checkpoint": str(model),
        "run.seed": seed,
        "grpo.steps": 0,
        "evaluation.before_training": False,
        **data,
        "data.train": data["data.sft"],
    }
    return study.launcher.train(home / "job", start)


def pool_of(study: Study, condition: str, seed: int) -> Sources:
    """Return the sources of a pool, with its labels; pool.json beside them describes it."""
    chosen = CONDITIONS[condition]
    home = study.folder(condition, seed) / "pool"
    clips = pool_clips(study.num, study.objects, chosen, seed)
    labels = labelled(clips, chosen, seed)
    videos = study.out / "data/videos"
    if chosen.is_selected:
        kept = kept_clips(labels, _selection(study, labels, condition, seed))
        names = {clip.name for clip in kept}
        labels, clips = kept, [clip for clip in clips if clip.name in names]
    sources = write_pool(home, labels, videos)
    write_file(home / "pool.json", json.dumps(label_quality(clips, labels), indent=1) + "\n")
    return sources


def _selection(study: Study, labels: list[Any], condition: str, seed: int) -> Path:
    """Return the folder of a finished selection from the whole pool by the cold start's answers."""
    home = study.folder(condition, seed)
    out = home / "selection"
    if not (out / "summary.json").exists():
        whole = write_pool(home / "whole-pool", labels, study.out / "data/videos")
        words = {
            "model.checkpoint": str(cold_start(study, seed) / "export"),
            "run.seed": seed,
            "data.train": json.dumps(whole),
            **SELECTION,
        }
        config = ("--config", CONFIG, "--out", out)
        overrides = [*study.launcher.overrides, *(f"{k}={v}" for k, v in words.items())]
        study.launcher.tool("select_data.py", *config, *overrides)
    return out


# ---- jobs


def common(study: Study, seed: int, checkpoint: Path, pool: Sources) -> dict[str, Any]:
    return {
        **common_data(study.out),
        "model.checkpoint": str(checkpoint),
        "run.seed": seed,
        "data.sft": pool,
        "data.train": pool,
        "evaluation.before_training": False,
    }


def sft_job(
    study: Study, condition: str, seed: int, steps: int, rate: float, is_evaluated: bool = True
) -> Path:
    """Return a finished job of SFT from the cold start.

    An evaluated job has a dev curve and ends with its best weights; its last weights are in the
    checkpoint sft-0-STEPS.
    """
    every = steps
    if is_evaluated:
        steps, every = with_evaluations(steps)
    start = cold_start(study, seed) / "export"
    settings = {
        **common(study, seed, start, pool_of(study, condition, seed)),
        **SFT,
        "sft.steps": steps,
        "sft.optimizer.lr": rate,
        "sft.evaluate_every": every,
        "sft.load_best_at_end": is_evaluated,
        "checkpoint.every_steps": steps,
        "grpo.steps": 0,
    }
    if not is_evaluated:
        settings["sft.stop_metric"] = "''"
    name = f"sft-{steps}-{rate:g}" + ("" if is_evaluated else "-last")
    return study.launcher.train(study.folder(condition, seed) / name, settings)


def grpo_job(
    study: Study,
    condition: str,
    seed: int,
    steps: int,
    start: Path,
    name: str,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Return a finished job of GRPO, with `changes` to its settings, from the job `start`."""
    settings = {
        **common(study, seed, start / "export", pool_of(study, condition, seed)),
        **GRPO,
        **changes,
        "sft.steps": 0,
        "grpo.steps": steps,
    }
    return study.launcher.train(study.folder(condition, seed) / name, settings)


def last_weights(study: Study, condition: str, seed: int, job: Path) -> Path:
    """Return a finished job that evaluates the last weights of an SFT job, and trains nothing."""
    checkpoint = job / f"checkpoints/sft-0-{max(dev_curve(job)):06d}"
    settings = {
        **common(study, seed, checkpoint, pool_of(study, condition, seed)),
        "sft.steps": 0,
        "grpo.steps": 0,
        "evaluation.before_training": True,
    }
    return study.launcher.train(job.with_name(f"{job.name}-last"), settings)


def best_rate(study: Study, condition: str, steps: int, by_last: bool) -> float:
    """Return the SFT rate with the best dev metric of seed `TUNING_SEED`.

    by_last: at the last step; otherwise in the best evaluation.
    """
    reached = {}
    for rate in SFT_RATES:
        curve = dev_curve(sft_job(study, condition, TUNING_SEED, steps, rate))
        reached[rate] = curve[max(curve)] if by_last else max(curve.values())
    return max(reached, key=lambda rate: reached[rate])


# ---- arms


def run_arm(
    study: Study, condition: str, arm: str, seed: int, seconds: Mapping[str, float]
) -> Record:
    """Run the jobs of an arm that are not finished, write its record and return it."""
    file = study.out / "records" / condition / f"seed-{seed}" / f"{arm}.json"
    found = _measured(study, condition, arm, seed, seconds)
    pool = study.folder(condition, seed) / "pool/pool.json"
    record = {
        "condition": condition,
        "arm": arm,
        "seed": seed,
        **found,
        "pool": json.loads(pool.read_text()) if pool.exists() else {},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(record, indent=1) + "\n")
    return record


def _measured(
    study: Study, condition: str, arm: str, seed: int, seconds: Mapping[str, float]
) -> Record:
    """Run an arm; return {"steps", "seconds", "rate", "dev", "home", "stage"}."""
    cell = (study, condition, seed)
    more = equal_steps(study.budget, seconds, "sft")
    updates = equal_steps(study.budget, seconds, "grpo")
    if arm == "cold":
        return {**_phases(study, [cold_start(study, seed)], ["sft"]), "seconds": 0.0, "steps": "0"}
    if arm == "sft":
        return _sft(study, sft_job(*cell, study.budget["sft"], SHORT_SFT_RATE), SHORT_SFT_RATE)
    if arm == "more_sft_best":
        rate = best_rate(study, condition, more, by_last=False)
        return _sft(study, sft_job(*cell, more, rate), rate)
    if arm == "more_sft":
        rate = best_rate(study, condition, more, by_last=True)
        job = sft_job(*cell, more, rate)
        last = last_weights(*cell, job)
        found = _phases(study, [job], ["sft"], rate)
        return found | {"home": _relative(study, last), "stage": "base"}
    if arm == "sft_updates":
        job = sft_job(*cell, updates, SHORT_SFT_RATE, is_evaluated=False)
        return _phases(study, [job], ["sft"], SHORT_SFT_RATE)
    if arm == "sft_grpo":
        first = sft_job(*cell, study.budget["sft"], SHORT_SFT_RATE)
        second = grpo_job(*cell, study.budget["grpo"], first, "sft-grpo")
        return _phases(study, [first, second], ["sft", "grpo"])
    if arm == "grpo_kl_seconds":
        updates = equal_steps(study.budget, seconds, "grpo_kl")
    suffix, changes = _CHANGES[arm]
    name = f"grpo-{updates}{suffix}"
    job = grpo_job(*cell, updates, cold_start(study, seed), name, changes)
    return _phases(study, [job], ["grpo"])


_CHANGES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "grpo": ("", {}),
    "grpo_annotation": ("-annotation", ANNOTATION),
    "grpo_kl": ("-kl", KL),
    "grpo_kl_seconds": ("-kl", KL),
}


def _sft(study: Study, job: Path, rate: float) -> Record:
    """Return the results of an SFT job that ends with its best weights."""
    curve = dev_curve(job)
    best = max(curve, key=lambda step: curve[step])
    return _phases(study, [job], ["sft"], rate) | {"steps": f"{best} of {max(curve)}"}


def _phases(study: Study, jobs: list[Path], phases: list[str], rate: float | None = None) -> Record:
    """Return the results of an arm that consists of these jobs, one after another."""
    spent = [step_seconds(job, phase) for job, phase in zip(jobs, phases, strict=True)]
    return {
        "steps": " + ".join(str(len(each)) for each in spent),
        "seconds": sum(map(sum, spent)),
        "rate": rate,
        "dev": dev_curve(jobs[-1]),
        "home": _relative(study, jobs[-1]),
        "stage": phases[-1],
    }


def _relative(study: Study, job: Path) -> str:
    return str(job.relative_to(study.out))
