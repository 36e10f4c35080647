"""Builds report.html: one page about a run, from the files in its directory.

The page is self-contained (inline style, SVG, base64 images). Sections without files are omitted.
`mvrl report RUN_DIR` rebuilds the page at any time, also during the run.
"""

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.errors import UserError
from megatron_vrl.observe.charts import Curve, svg
from megatron_vrl.observe.metrics import METRICS, metric_info
from megatron_vrl.observe.page import render
from megatron_vrl.process.run_lock import held
from megatron_vrl.storage.files import read_error, read_rows, write_file

RUNNING_S = 600.0  # without a lock file, a run counts as running if its last row is newer
ERROR = "ended by an error"
MAX_SAMPLES = 12  # logged samples on the page, evenly spaced over the steps
CURVES = (  # (phase, metric) in page order
    ("grpo", "reward/mean"),
    ("grpo", "reward/format"),
    ("grpo", "response_length/mean"),
    ("grpo", "actor/kl"),
    ("grpo", "actor/entropy"),
    ("grpo", "rollout/zero_variance_groups"),
    ("grpo", "rollout/zero_iou_groups"),
    ("grpo", "rollout/logprob_gap"),
    ("sft", "sft/loss"),
)
TABLE = frozenset(name for name, shown in METRICS.items() if shown.unit == "%") | {"reward/mean"}
STAGES = {"base": "before training", "sft": "after warm-up (SFT)", "grpo": "after GRPO"}
PHASES = {"sft": "SFT", "grpo": "GRPO", "eval": "evaluation"}
Rows = list[dict[str, Any]]


def build_report(out_dir: Path) -> Path:
    """Write report.html and return its path. Call on rank 0 only.

    Raises UserError if metrics.jsonl has no rows, or metrics by their earlier names.
    """
    rows = read_rows(out_dir / "metrics.jsonl")
    if not rows:
        raise UserError(f"{out_dir} holds no metrics.jsonl with rows. Give the out_dir of a run.")
    if "timing_s" not in rows[0]:
        raise UserError(
            f"{out_dir}/metrics.jsonl has no `timing_s`: an earlier version wrote it, and its "
            "metrics have other names (see CHANGELOG.md). Build the report with that version."
        )
    summary_path = out_dir / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.is_file() else {}
    config_path = out_dir / "config.yaml"
    state = "" if summary else run_state(out_dir)
    page = render(
        "report.html.j2",
        name=out_dir.resolve().name,
        steps={phase: _last_step(rows, phase) for phase in ("sft", "grpo")},
        summary=summary,
        tables=result_tables(summary or {"results": results_so_far(rows)}),
        state=state,
        error=read_error(out_dir) if state.startswith(ERROR) else "",
        charts=[(curve, svg(curve)) for curve in curves(rows)],
        budgets=time_budgets(rows),
        config=config_path.read_text() if config_path.is_file() else "",
        samples=[
            _shown(sample, out_dir) for sample in _spread(read_rows(out_dir / "samples.jsonl"))
        ],
    )
    write_file(out_dir / "report.html", page)
    return out_dir / "report.html"


def results_so_far(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Return stage -> split -> metrics from the evaluation rows of a run without a summary."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        stage, split = row.get("during"), row.get("split")
        if row["phase"] == "eval" and stage in STAGES and split not in (None, "dev"):
            metrics = {name: value for name, value in row.items() if isinstance(value, float)}
            results.setdefault(str(stage), {})[str(split)] = metrics
    return results


def run_state(out_dir: Path) -> str:
    """Return the state of a run without a summary.

      running             a process holds the lock of the run directory
      ended by an error   error.txt exists
      crashed             holder.json still names a process, but no process holds the lock
      stopped early       the lock was released before the last step

    A directory without a lock counts as running if its last row is younger than RUNNING_S.
    """
    age_s = max(0.0, time.time() - (out_dir / "metrics.jsonl").stat().st_mtime)
    row = f"last row {age_s:.0f} s ago" if age_s < 120 else f"last row {age_s / 60:.0f} minutes ago"
    lock = held(out_dir)
    if lock and lock.now:
        return f"running ({', '.join(filter(None, (lock.holder, row)))})"
    if read_error(out_dir):
        return f"{ERROR} ({row})"
    if lock is None and age_s < RUNNING_S:
        return f"running ({row})"
    if lock is None:
        return f"stopped early, or in a long step ({row})"
    if lock.holder:
        return f"crashed: its process ended without releasing the run directory ({row})"
    return f"stopped early ({row})"


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Results on one split."""

    split: str
    columns: list[str]
    rows: list[tuple[str, str, list[str]]]  # label, "model" or "trivial", formatted cells


def result_tables(summary: dict[str, Any]) -> list[ResultTable]:
    """Return one table per split: trivial baselines first, then the stages of the model in order.

    The tables have percentages and the reward. summary.json has all metrics.
    """
    results, trivial = summary.get("results", {}), summary.get("trivial", {})
    tables = []
    for split in dict.fromkeys(split for stage in results.values() for split in stage):
        lines = [(label, "trivial", metrics) for label, metrics in trivial.get(split, {}).items()]
        lines += [
            (STAGES[stage], "model", results[stage][split])
            for stage in STAGES
            if split in results.get(stage, {})
        ]
        measured_names = {name for _, _, metrics in lines for name in metrics}
        names = [name for name in METRICS if name in measured_names and name in TABLE]
        shown = [
            (label, kind, [_cell(metrics, n) for n in names]) for label, kind, metrics in lines
        ]
        tables.append(ResultTable(split, [_heading(n) for n in names], shown))
    return tables


def curves(rows: Rows) -> list[Curve]:
    """Return the curves of CURVES with at least two values, then those of the split `dev`."""
    wanted = [(name, PHASES[p], _pick(rows, name, phase=p)) for p, name in CURVES]
    dev = [row for row in rows if row.get("split") == "dev"]
    for name in sorted({n for row in dev for n in row if n in METRICS}, key=_column_order):
        for during in ("sft", "grpo"):
            wanted.append((name, f"dev split, {PHASES[during]}", _pick(dev, name, during=during)))
    return [
        Curve(
            title=f"{metric_info(name).title}, {where}",
            unit="fraction" if metric_info(name).unit == "%" else metric_info(name).unit,
            steps=[step for step, _ in points],
            values=[value for _, value in points],
        )
        for name, where, points in wanted
        if len(points) > 1
    ]


def time_budgets(rows: Rows) -> list[tuple[str, float, list[tuple[str, float]]]]:
    """Return (phase, total seconds, [(part, seconds), ...] with the longest part first)."""
    totals: dict[str, dict[str, float]] = {}
    for row in rows:
        parts = totals.setdefault(row["phase"], {})
        for part, seconds in row["timing_s"].items():
            parts[part] = parts.get(part, 0.0) + seconds
    ranked = {
        PHASES[p]: sorted(parts.items(), key=lambda part: -part[1]) for p, parts in totals.items()
    }
    return [(phase, sum(s for _, s in parts), parts) for phase, parts in ranked.items() if parts]


def _pick(rows: Rows, name: str, **where: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a metric in the rows that match `where`."""
    chosen = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    return [(row["step"], row[name]) for row in chosen if row.get(name) is not None]


def _last_step(rows: Rows, phase: str) -> int:
    """Return the last step of a phase; 0 if it has no row."""
    return max((row["step"] for row in rows if row["phase"] == phase), default=0)


def _spread(samples: Rows) -> Rows:
    """Return at most MAX_SAMPLES logged samples, evenly spaced, with the first and the last."""
    count = min(MAX_SAMPLES, len(samples))
    return [samples[i * (len(samples) - 1) // max(1, count - 1)] for i in range(count)]


def _shown(sample: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """Return the template values of a logged sample: best, middle and worst answer first."""
    image = ""
    if sample["strip"]:  # "": text alone
        encoded = base64.b64encode((out_dir / sample["strip"]).read_bytes()).decode()
        image = f"data:image/jpeg;base64,{encoded}"
    answers = sorted(sample["answers"], key=lambda answer: -answer["reward"])
    kept = sorted({0, len(answers) // 2, len(answers) - 1})  # best, middle, worst
    return sample | {
        "phase": PHASES[sample["phase"]],
        "strip": image,
        "kept": [answers[i] for i in kept],
        "rest": [answer for i, answer in enumerate(answers) if i not in kept],
    }


def _column_order(name: str) -> tuple[int, str]:
    """Return the sort key of a metric: its position in METRICS, unknown metrics last."""
    known = list(METRICS)
    return (known.index(name) if name in known else len(known), name)


def _heading(name: str) -> str:
    """Return the column heading of a metric."""
    title, unit = metric_info(name)
    return f"{title}, {unit}" if unit not in ("", "%") else title


def _cell(metrics: dict[str, float], name: str) -> str:
    """Return the formatted value of a metric; "" if it is missing."""
    if name not in metrics:
        return ""
    return f"{100 * metrics[name]:.1f}" if metric_info(name).unit == "%" else f"{metrics[name]:.3f}"
