#!/usr/bin/env python3
"""Run the quickstart over several seeds, beside more SFT for an equal time: the README's table.

    quickstart_study.py --out runs/study --seeds 1 2 3 [--objects 1] [section.key=value ...]

For each seed: a fresh tiny model, the main job (warm-up, then GRPO), and from the same warm-up
checkpoint a second arm that spends GRPO's seconds on more SFT. One synthetic set serves all seeds.
The study writes OUT/study.json and OUT/table.md. It reuses finished arms, so it can be resumed.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_vrl.observe.progress import log_written
from megatron_vrl.process.command_line import tool_parser
from megatron_vrl.process.entry import run_program

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    "temporal_grounding/miou": "mIoU",
    "temporal_grounding/r1@0.3": "R@0.3",
    "temporal_grounding/r1@0.5": "R@0.5",
    "temporal_grounding/r1@0.7": "R@0.7",
    "multiple_choice/accuracy": "MC acc.",
    "grounded_qa/accuracy": "QA acc.",
    "grounded_qa/miou": "QA mIoU",
    "format_rate": "format",
    "reward/mean": "reward",
}
ARMS = {
    "base": "base",
    "sft": "warm-up",
    "grpo": "warm-up, then GRPO",
    "more_sft": "warm-up, then more SFT",
}
SPLITS = {"heldout": "held-out", "ood": "out of domain"}


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the study"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    parser.add_argument("--objects", type=int, default=1, help="shapes in a clip")
    parser.add_argument("--num", type=int, default=3200, help="clips of the set")
    parser.add_overrides()
    arguments = parser.parse_args()
    out = arguments.out
    tool(
        "make_synthetic.py",
        "--out",
        out / "data",
        "--num",
        arguments.num,
        "--objects",
        arguments.objects,
    )
    summaries = [run_seed(out, seed, arguments.overrides) for seed in arguments.seeds]
    (out / "study.json").write_text(json.dumps(summaries, indent=1) + "\n")
    table = "\n".join(line for split in SPLITS for line in rows(summaries, split))
    (out / "table.md").write_text(table + "\n")
    print(table, flush=True)
    log_written(out)


def run_seed(out: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Run both arms of one seed; return {"seed", "results": arm -> split -> metric, ...}."""
    home = out / f"seed-{seed}"
    model = home / "model-hf"
    if not model.exists():
        tool("make_tiny_model.py", "--out", model, "--seed", seed)
    common = [f"run.seed={seed}", "checkpoint.keep=100", "observe.wandb=disabled", *overrides]
    main_job = train(out, home / "job", [f"model.checkpoint={model}", *common])
    warm_up = next((home / "job/checkpoints").glob("grpo-*-000000"))
    steps = equal_steps(home / "job")
    more = [
        f"model.checkpoint={warm_up}",
        f"sft.steps={steps}",
        "sft.stop_metric=''",
        "grpo.steps=0",
    ]
    longer = train(out, home / "more-sft", [*common, *more])
    return {
        "seed": seed,
        "warm_up_steps": last_step(home / "job", "sft"),
        "warm_up_restarts": main_job["warm_up_restarts"],
        "more_sft_steps": steps,
        "results": {**main_job["results"], "more_sft": longer["results"]["sft"]},
        "trivial": main_job["trivial"],
        "timing_s": main_job["timing_s"],
        "peak_rss_bytes_all_ranks": main_job["peak_rss_bytes_all_ranks"],
    }


def equal_steps(job: Path) -> int:
    """Return the SFT steps that take as long as GRPO did, without evaluation and checkpoints."""
    work = ("encode", "sync", "rollout", "score", "update", "other")
    seconds: dict[str, list[float]] = {"sft": [], "grpo": []}
    for row in metric_rows(job):
        if row["phase"] in seconds:
            seconds[row["phase"]].append(sum(row["timing_s"].get(name, 0.0) for name in work))
    return round(sum(seconds["grpo"]) / statistics.median(seconds["sft"]))


def rows(summaries: list[dict[str, Any]], split: str) -> list[str]:
    """Return a Markdown table: mean and range over the seeds, in percent except the reward."""
    columns = [name for name in COLUMNS if name in summaries[0]["results"]["base"][split]]
    lines = ["", f"| {SPLITS[split]} | " + " | ".join(COLUMNS[name] for name in columns) + " |"]
    lines.append("|" + "-|" * (len(columns) + 1))
    measured = {label: [metrics] for label, metrics in summaries[0]["trivial"][split].items()}
    for arm, label in ARMS.items():
        measured[label] = [summary["results"][arm][split] for summary in summaries]
    for label, seeds in measured.items():
        cells = [cell(name, [metrics[name] for metrics in seeds]) for name in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def cell(name: str, values: list[float]) -> str:
    mean, low, high = (
        f"{value:.3f}" if name == "reward/mean" else f"{100 * value:.1f}"
        for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low}-{high})"


def train(out: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Run or reuse one job; return its summary."""
    data = [
        f"data.{part}={json.dumps(moved(sources, out))}"
        for part, sources in quickstart_data().items()
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [
        "2",
        "-m",
        "megatron_vrl.cli.train",
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
    ]
    subprocess.run([*command, f"run.out_dir={run_dir}", *data, *overrides], check=True)
    return json.loads((run_dir / "summary.json").read_text())  # type: ignore[no-any-return]


def quickstart_data() -> dict[str, Any]:
    import yaml

    data = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())["data"]
    return {part: data[part] for part in ("sft", "train", "evaluation")}


def moved(sources: Any, out: Path) -> Any:
    """Return the sources of the quickstart with paths in the study's data."""
    return json.loads(json.dumps(sources).replace("runs/quickstart/data", str(out / "data")))


def metric_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last_step(run_dir: Path, phase: str) -> int:
    return max(int(row["step"]) for row in metric_rows(run_dir) if row["phase"] == phase)


def tool(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *map(str, arguments)], check=True)


if __name__ == "__main__":
    run_program(main)
