#!/usr/bin/env python3
"""Compare training on selected clips with an equal number of random ones; docs/selection.md.

    selection_study.py --out runs/selection-study [--seeds 1 2 3] [--steps 60] [--wrong 0.5 0.0]
                       [section.key=value ...]

The pool has one-object grounding clips. A fraction of them gets a wrong annotation, a random
interval of the same distribution. Each seed has a fresh tiny model, a warm-up that stops early, and
one call of tools/select_data.py on the pool; then GRPO with equal settings on equally many clips,
chosen

    both     with a mean temporal IoU at or above the pool's median, the widest spread of them
    random   at random
    spread   by the widest spread alone
    floor    at random from those at or above the median

and greedy answers to clean held-out clips at intervals. A clean pool has the first two arms only.
All seeds share one set of videos; wrong annotations, model, warm-up, samples and order change with
the seed. The study writes OUT/study.json and OUT/table.md after every arm. It reuses what is there,
so it can be resumed; give another OUT for other settings.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthetic.clips import DURATION_S, INTERVAL_S

from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

ROOT = Path(__file__).resolve().parents[1]

CONFIG = ROOT / "configs/quickstart.yaml"
CLIPS = {"sft": 1600, "train": 384, "dev": 128, "heldout": 256, "ood": 0}
KEPT = 96
DIRTY_ARMS, CLEAN_ARMS = ("both", "random", "spread", "floor"), ("both", "random")
METRIC = "temporal_grounding/miou"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Sample of the pool with the temporal IoU of its answers."""

    id: str
    mean: float
    std: float
    is_wrong: bool
    passes: bool  # the default rules of section `selection`


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the study"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    parser.add_argument("--steps", type=int, default=60, help="GRPO steps of every arm")
    parser.add_argument(
        "--wrong",
        type=float,
        nargs="+",
        default=[0.5, 0.0],
        metavar="SHARE",
        help="fractions of wrong annotations (default: 0.5 0.0)",
    )
    parser.add_overrides("replace a value of the config of every arm")
    arguments = parser.parse_intermixed_args()
    out: Path = arguments.out
    sizes = [word for name, size in CLIPS.items() for word in ("--split", f"{name}={size}")]
    tool("make_synthetic.py", "--out", out / "data", "--mix", "temporal_grounding=1", *sizes)
    done: list[dict[str, Any]] = []
    for share in arguments.wrong:
        for seed in arguments.seeds:
            pool = measured_pool(out, seed, share)
            for arm in DIRTY_ARMS if share else CLEAN_ARMS:
                done.append(run_arm(out, seed, share, arm, pool, arguments))
                (out / "study.json").write_text(json.dumps(done, indent=1) + "\n")
                (out / "table.md").write_text("\n".join(table(done)) + "\n")
    print("\n".join(table(done)), flush=True)
    log_written(out)


# ---- pure parts


def corrupted(
    annotation: dict[str, Any], share: float, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the annotation with random intervals for a `share` of its clips, and their names.

    The intervals have the distribution of make_synthetic and differ from the true ones.
    """
    rng = np.random.default_rng([seed, 0])
    names = sorted(annotation)
    wrong = sorted(rng.choice(names, round(share * len(names)), replace=False).tolist())
    changed = dict(annotation)
    for name in wrong:
        true = annotation[name]["timestamps"]
        drawn = true
        while drawn == true:
            length = int(rng.integers(INTERVAL_S[0], INTERVAL_S[1] + 1))
            start = int(rng.integers(0, DURATION_S - length + 1))
            drawn = [[float(start), float(start + length)]]
        changed[name] = annotation[name] | {"timestamps": drawn}
    return changed, wrong


def choose(pool: Sequence[Measured], arm: str, count: int, seed: int) -> list[Measured]:
    """Return `count` samples by an arm's rule: the tool's rules with min_std 0 and a budget."""
    median = statistics.median(sample.mean for sample in pool)
    floor = median if arm in ("both", "floor") else 0.0
    passing = [sample for sample in pool if sample.mean >= floor]
    if arm in ("both", "spread"):
        return sorted(passing, key=lambda sample: -sample.std)[:count]
    drawn = np.random.default_rng([seed, 1]).choice(len(passing), count, replace=False)
    return [passing[index] for index in drawn]


def table(done: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table: mean and range over the seeds."""
    steps = sorted({int(step) for row in done for step in row["miou"]})
    heads = ["wrong in pool", "trained on", "seeds", "wrong in subset"]
    lines = ["| " + " | ".join(heads + [f"mIoU @{step}" for step in steps]) + " |"]
    lines.append("|-" * (len(heads) + len(steps)) + "|")
    for share, arm in dict.fromkeys((row["share"], row["arm"]) for row in done):
        rows = [row for row in done if (row["share"], row["arm"]) == (share, arm)]
        cells = [
            f"{share:.0%}",
            arm,
            str(len(rows)),
            cell([row["wrong"] for row in rows], "{:.0%}"),
        ]
        cells += [cell([row["miou"][str(step)] for row in rows], "{:.3f}") for step in steps]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(values: Sequence[float], form: str) -> str:
    mean, low, high = (form.format(f(values)) for f in (statistics.mean, min, max))
    return f"{mean} ({low} to {high})"


# ---- what is run


def warm_up(out: Path, seed: int) -> Path:
    """Return a Hugging Face checkpoint that grounds a little, trained once for each seed."""
    home = out / f"seed-{seed}"
    if not (home / "model-hf").exists():
        tool("make_tiny_model.py", "--out", home / "model-hf", "--seed", seed)
    evaluation = {name: [source(out, name)] for name in ("dev", "heldout")}
    train(
        home / "warm-up",
        seed,
        f"model.checkpoint={home / 'model-hf'}",
        f"data.sft={json.dumps([source(out, 'sft')])}",
        f"data.train={json.dumps([source(out, 'train')])}",
        f"data.evaluation={json.dumps(evaluation)}",
        "grpo.steps=0",
    )
    return home / "warm-up" / "export"


def measured_pool(out: Path, seed: int, share: float) -> list[Measured]:
    """Return the pool with the statistics of the warm-up model's answers."""
    home = out / f"seed-{seed}" / f"wrong-{share:g}"
    home.mkdir(parents=True, exist_ok=True)
    true = json.loads(Path(source(out, "train")["json_path"]).read_text())
    annotation, wrong = corrupted(true, share, seed)
    (home / "pool.json").write_text(json.dumps(annotation))
    start = warm_up(out, seed)
    if not (home / "selection" / "summary.json").exists():
        overrides = [f"data.train={json.dumps([pool_source(out, home)])}", f"run.seed={seed}"]
        overrides += [f"model.checkpoint={start}"]
        common = ("--config", CONFIG, "--out", home / "selection")
        tool("select_data.py", *common, *overrides)
    rows = (home / "selection" / "stats.jsonl").read_text().splitlines()
    return [
        Measured(
            id=row["id"],
            is_wrong=row["id"].startswith(tuple(wrong)),
            passes=row["verdict"] == "kept",
            **row["components"]["temporal_iou"],
        )
        for row in map(json.loads, rows)
    ]


def run_arm(
    out: Path,
    seed: int,
    share: float,
    arm: str,
    pool: Sequence[Measured],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    home = out / f"seed-{seed}" / f"wrong-{share:g}"
    chosen = choose(pool, arm, KEPT, seed)
    kept = home / f"kept-{arm}.jsonl"
    kept.write_text("".join(json.dumps({"id": sample.id}) + "\n" for sample in chosen))
    train(
        home / arm,
        seed,
        f"model.checkpoint={warm_up(out, seed)}",
        f"data.train={json.dumps([pool_source(out, home)])}",
        f"data.selection={kept}",
        f"data.evaluation={json.dumps({'dev': [source(out, 'heldout')]})}",
        "sft.steps=0",
        f"grpo.steps={arguments.steps}",
        f"grpo.evaluate_every={max(1, arguments.steps // 2)}",
        "rollout.prompts_per_step=16",
        "rollout.save=false",
        *arguments.overrides,
    )
    passing = [sample for sample in pool if sample.passes]
    start = json.loads((out / f"seed-{seed}/warm-up/summary.json").read_text())["results"]["sft"]
    after = {
        str(row["step"]): row[METRIC] for row in metric_rows(home / arm) if row["phase"] == "eval"
    }
    return {
        "seed": seed,
        "share": share,
        "arm": arm,
        "wrong": statistics.mean(sample.is_wrong for sample in chosen),
        "miou": {"0": start["heldout"][METRIC], **after},
        "mean_iou": statistics.mean(sample.mean for sample in chosen),
        "std_iou": statistics.mean(sample.std for sample in chosen),
        "default_rules": {
            "keep": len(passing),
            "of": len(pool),
            "wrong": statistics.mean(sample.is_wrong for sample in passing),
        },
        "timing_s": json.loads((home / arm / "summary.json").read_text())["timing_s"],
    }


def train(run_dir: Path, seed: int, *overrides: str) -> None:
    """Run a job of one process, unless it is finished."""
    options = (f"run.out_dir={run_dir}", f"run.seed={seed}", "observe.wandb=disabled", *overrides)
    program = ["-m", "megatron_vrl.cli.train", "--config", str(CONFIG), *options]
    subprocess.run([sys.executable, *program], check=True, env=environment())


def source(out: Path, split: str) -> dict[str, str]:
    annotation = out / "data" / "annotations" / f"{split}_temporal_grounding.json"
    return described(out, annotation)


def pool_source(out: Path, home: Path) -> dict[str, str]:
    return described(out, home / "pool.json")


def described(out: Path, annotation: Path) -> dict[str, str]:
    videos = str(out / "data" / "videos")
    return {"json_path": str(annotation), "data_folder": videos, "format": "charades_sta"}


def metric_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tool(name: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    subprocess.run(command, check=True, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    run_program(main)
