"""report.html: one page that says what a run did, built only from the files in its directory.

Self-contained (inline style, SVG, base64 images), so it can be sent to someone as it is. What a
run did not write is left out of the page. Build it again at any time, also while the run goes on:
`python -m megatron_vrl.observe.report RUN_DIR`.
"""

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.errors import UserError
from megatron_vrl.observe.charts import Curve, svg
from megatron_vrl.observe.metrics import MEANINGS, meaning
from megatron_vrl.observe.page import render
from megatron_vrl.observe.progress import say_written
from megatron_vrl.process.command_line import OverrideParser
from megatron_vrl.process.entry import run_program
from megatron_vrl.process.run_lock import held
from megatron_vrl.storage.files import read_error, read_rows, write_file

RUNNING_S = 600.0  # without a lock: a run that wrote a row within this time is taken to be running
ERROR = "ended by an error"
CARDS = 12  # shown, evenly spread over the steps
CURVES = (  # phase and metric, in the order of the page
    ("grpo", "reward"),
    ("grpo", "format_rate"),
    ("grpo", "response_tokens"),
    ("grpo", "ref_kl"),
    ("grpo", "entropy"),
    ("grpo", "logprob_gap"),
    ("sft", "loss"),
)
TABLE = frozenset(name for name, shown in MEANINGS.items() if shown.unit == "%") | {"reward"}
STAGES = {"base": "before training", "sft": "after warm-up (SFT)", "grpo": "after GRPO"}
PHASES = {"sft": "SFT", "grpo": "GRPO", "eval": "evaluation"}
Rows = list[dict[str, Any]]


def build_report(out_dir: Path) -> Path:
    """Rank 0 only. Raises UserError when the directory holds no rows of a run."""
    rows = read_rows(out_dir / "metrics.jsonl")
    if not rows:
        raise UserError(f"{out_dir} holds no metrics.jsonl with rows. Give the out_dir of a run.")
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
        cards=[_shown(card, out_dir) for card in _spread(read_rows(out_dir / "cards.jsonl"))],
    )
    write_file(out_dir / "report.html", page)
    return out_dir / "report.html"


def results_so_far(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Return stage -> split -> metrics of the evaluations that a run has written to its rows."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        stage, split = row.get("during"), row.get("split")
        if row["phase"] == "eval" and stage in STAGES and split not in (None, "dev"):
            numbers = {name: value for name, value in row.items() if isinstance(value, float)}
            found.setdefault(str(stage), {})[str(split)] = numbers
    return found


def run_state(out_dir: Path) -> str:
    """Return what a run without a summary does: it crashed, is running, or stopped early.

    Its lock decides; for a run that has none, the age of its last row.
    """
    age_s = max(0.0, time.time() - (out_dir / "metrics.jsonl").stat().st_mtime)
    row = f"last row {age_s:.0f} s ago" if age_s < 120 else f"last row {age_s / 60:.0f} minutes ago"
    found = held(out_dir)
    if found and found.now:
        return f"running ({', '.join(filter(None, (found.holder, row)))})"
    if read_error(out_dir):
        return f"{ERROR} ({row})"
    if found is None and age_s < RUNNING_S:
        return f"running ({row})"
    if found is None:
        return f"stopped early or at a long step ({row})"
    if found.holder:
        return f"crashed: its process ended without giving the directory back ({row})"
    return f"stopped early ({row})"


@dataclass(frozen=True, slots=True)
class ResultTable:
    split: str
    columns: list[str]
    rows: list[tuple[str, str, list[str]]]  # label, "model" or "trivial", cells as shown


def result_tables(summary: dict[str, Any]) -> list[ResultTable]:
    """One table per split: fixed answers first, then the model's stages in the order of time.

    Shares and the reward only; summary.json has every number.
    """
    results, trivial = summary.get("results", {}), summary.get("trivial", {})
    tables = []
    for split in dict.fromkeys(split for stage in results.values() for split in stage):
        lines = [(label, "trivial", found) for label, found in trivial.get(split, {}).items()]
        lines += [
            (STAGES[stage], "model", results[stage][split])
            for stage in STAGES
            if split in results.get(stage, {})
        ]
        found_names = {name for _, _, found in lines for name in found}
        names = [name for name in MEANINGS if name in found_names and name in TABLE]
        shown = [(label, kind, [_cell(found, n) for n in names]) for label, kind, found in lines]
        tables.append(ResultTable(split, [_heading(n) for n in names], shown))
    return tables


def curves(rows: Rows) -> list[Curve]:
    """Those of CURVES with at least two values, then every metric of the split `dev`."""
    wanted = [(name, PHASES[p], _pick(rows, name, phase=p)) for p, name in CURVES]
    dev = [row for row in rows if row.get("split") == "dev"]
    for name in sorted({n for row in dev for n in row if n in MEANINGS}, key=_column_order):
        for during in ("sft", "grpo"):
            wanted.append((name, f"dev split, {PHASES[during]}", _pick(dev, name, during=during)))
    return [
        Curve(
            title=f"{meaning(name).title}, {where}",
            unit="share" if meaning(name).unit == "%" else meaning(name).unit,
            steps=[step for step, _ in points],
            values=[value for _, value in points],
        )
        for name, where, points in wanted
        if len(points) > 1
    ]


def time_budgets(rows: Rows) -> list[tuple[str, float, list[tuple[str, float]]]]:
    """(phase, its seconds, [(part, seconds), ...] longest first)."""
    totals: dict[str, dict[str, float]] = {}
    for row in rows:
        parts = totals.setdefault(row["phase"], {})
        for part, seconds in row["seconds"].items():
            parts[part] = parts.get(part, 0.0) + seconds
    ranked = {
        PHASES[p]: sorted(parts.items(), key=lambda part: -part[1]) for p, parts in totals.items()
    }
    return [(phase, sum(s for _, s in parts), parts) for phase, parts in ranked.items() if parts]


def _pick(rows: Rows, name: str, **where: str) -> list[tuple[int, float]]:
    chosen = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    return [(row["step"], row[name]) for row in chosen if row.get(name) is not None]


def _last_step(rows: Rows, phase: str) -> int:
    return max((row["step"] for row in rows if row["phase"] == phase), default=0)


def _spread(cards: Rows) -> Rows:
    count = min(CARDS, len(cards))
    return [cards[i * (len(cards) - 1) // max(1, count - 1)] for i in range(count)]


def _shown(card: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    image = base64.b64encode((out_dir / card["strip"]).read_bytes()).decode()
    answers = sorted(card["answers"], key=lambda answer: -answer["reward"])
    kept = sorted({0, len(answers) // 2, len(answers) - 1})  # best, middle, worst
    return card | {
        "phase": PHASES[card["phase"]],
        "strip": f"data:image/jpeg;base64,{image}",
        "kept": [answers[i] for i in kept],
        "rest": [answer for i, answer in enumerate(answers) if i not in kept],
    }


def _column_order(name: str) -> tuple[int, str]:
    known = list(MEANINGS)
    return (known.index(name) if name in known else len(known), name)


def _heading(name: str) -> str:
    title, unit = meaning(name)
    return f"{title}, {unit}" if unit not in ("", "%") else title


def _cell(found: dict[str, float], name: str) -> str:
    if name not in found:
        return ""
    return f"{100 * found[name]:.1f}" if meaning(name).unit == "%" else f"{found[name]:.3f}"


def main() -> None:
    parser = OverrideParser(
        prog="megatron_vrl.observe.report", description="Build report.html of a run again."
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run.out_dir of a run")
    say_written(build_report(parser.parse_args().run))


if __name__ == "__main__":
    run_program(main)
