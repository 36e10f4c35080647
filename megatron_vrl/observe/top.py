"""Text view of a run, from the files in its directory: state, progress, metrics, time, evaluations.

Lines have at most 80 columns. `mvrl top` shows it again and again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_vrl.errors import UserError
from megatron_vrl.observe.metrics import metric_info
from megatron_vrl.observe.report import PHASES, run_state
from megatron_vrl.storage.files import read_error, read_rows

COLUMNS = 80
RECENT = 20  # steps of the mean beside the last value
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 20  # columns
SHOWN = {
    "sft": ("sft/loss", "sft/grad_norm", "sft/lr"),
    "grpo": (
        "reward/mean",
        "reward/",  # every component
        "response_length/mean",
        "response_length/clip_ratio",
        "rollout/zero_variance_groups",
        "rollout/logprob_gap",
        "rollout/staleness",
        "actor/entropy",
        "actor/kl",
        "actor/grad_norm",
        "actor/lr",
        "perf/tokens_per_second",
        "perf/mfu",
        "perf/peak_memory_gib",
    ),
}
NOT_COMPONENTS = ("reward/mean", "reward/std", "reward/errors")
Rows = list[dict[str, Any]]


def view(out_dir: Path) -> tuple[list[str], bool]:
    """Return the lines that describe a run now, and whether it is running.

    Raises UserError if the directory has no metrics yet.
    """
    rows = read_rows(out_dir / "metrics.jsonl")
    steps = [row for row in rows if row["phase"] in SHOWN]
    if not steps:
        raise UserError(
            f"{out_dir} has no metrics.jsonl with a step yet: give run.out_dir of a run."
        )
    ended = (out_dir / "summary.json").is_file()
    state = "finished" if ended else run_state(out_dir)
    phase = steps[-1]["phase"]
    current = [row for row in steps if row["phase"] == phase]
    lines = [_title(str(out_dir), state), *_error(out_dir, state), ""]
    lines += [_progress(current, _total(out_dir, phase), is_ended=ended), _times(current), ""]
    lines += _metrics(current)
    lines += _evaluations(rows)
    return lines, state.startswith("running")


def _title(path: str, state: str) -> str:
    """Return path and state; a path that does not fit the line loses its beginning."""
    room = max(0, COLUMNS - len(state) - len(": "))
    return f"{path if len(path) <= room else '...' + path[len(path) - room + 3 :]}: {state}"


def _error(out_dir: Path, state: str) -> list[str]:
    """Return the sentence that ended the run, if one did."""
    return [read_error(out_dir)] if state.startswith("ended by an error") else []


def _total(out_dir: Path, phase: str) -> int:
    """Return the steps of a phase by the run's config; 0 if it has none."""
    config = out_dir / "config.yaml"
    if not config.is_file():
        return 0
    return int(yaml.safe_load(config.read_text())[phase]["steps"])


def _progress(rows: Rows, total: int, *, is_ended: bool) -> str:
    """Return phase, step, seconds of a step and time left: "GRPO step 5 of 9, 2.0 s, 8 s left"."""
    step, seconds = rows[-1]["step"], _step_seconds(rows)
    line = f"{PHASES[rows[-1]['phase']]} step {step}"
    line += f" of {total}" if total else ""
    line += f", {seconds:.3g} s a step"
    left = (total - step) * seconds
    return line if is_ended or left <= 0 else f"{line}, {_duration(left)} left"


def _step_seconds(rows: Rows) -> float:
    """Return the median seconds of the last RECENT steps."""
    return float(np.median([sum(row["timing_s"].values()) for row in rows[-RECENT:]]))


def _duration(seconds: float) -> str:
    """Return a time of at most two units: "45 s", "12 min", "3 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _times(rows: Rows) -> str:
    """Return the shares of a step's time, over the last RECENT steps, with the longest first."""
    totals: dict[str, float] = {}
    for row in rows[-RECENT:]:
        for part, seconds in row["timing_s"].items():
            totals[part] = totals.get(part, 0.0) + seconds
    whole = sum(totals.values()) or 1.0
    ranked = sorted(totals.items(), key=lambda part: -part[1])
    shares = [f"{part} {100 * s / whole:.0f} %" for part, s in ranked if s / whole >= 0.005]
    return _cut("time of a step: " + ", ".join(shares))


def _metrics(rows: Rows) -> list[str]:
    """Return a table of the phase's metrics: last value, mean of recent steps, curve."""
    names = [name for entry in SHOWN[rows[-1]["phase"]] for name in _names(entry, rows[-1])]
    lines = [f"{'metric':<31}{'last':>11}{f'mean of {RECENT}':>13}   since step {rows[0]['step']}"]
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            last, recent = _shown(name, values[-1]), _shown(name, float(np.mean(values[-RECENT:])))
            lines.append(f"{name[:30]:<31}{last:>11}{recent:>13}   {curve(values)}")
    return lines


def _names(entry: str, row: dict[str, Any]) -> list[str]:
    """Return the metric names of an entry of SHOWN; one that ends in "/" stands for several."""
    if not entry.endswith("/"):
        return [entry]
    return [name for name in row if name.startswith(entry) and name not in NOT_COMPONENTS]


def _shown(name: str, value: float) -> str:
    """Return a value with its unit: a fraction as a percentage, others with four digits."""
    return f"{100 * value:.1f} %" if metric_info(name).unit == "%" else f"{value:.4g}"


def curve(values: Sequence[float]) -> str:
    """Return the values, averaged into at most CURVE bins, as a line of blocks.

    The lowest bin has the lowest block, the highest bin the highest. Example: [1, 2, 3] -> "▁▅█".
    """
    bins = [float(part.mean()) for part in np.array_split(values, min(CURVE, len(values)))]
    low, high = min(bins), max(bins)
    if not high > low:
        return BLOCKS[0] * len(bins)
    return "".join(BLOCKS[round((b - low) / (high - low) * (len(BLOCKS) - 1))] for b in bins)


def _evaluations(rows: Rows) -> list[str]:
    """Return the newest evaluation of each split: its step and the metrics that are fractions."""
    newest = {row["split"]: row for row in rows if row["phase"] == "eval"}
    if not newest:
        return []
    lines = ["", "newest evaluations"]
    for split, row in newest.items():
        where = PHASES.get(row["during"], "before training")
        lines.append(f"  {split}, {where}" + (f" step {row['step']}" if row["step"] else ""))
        shown = {
            name: value
            for name, value in row.items()
            if isinstance(value, float) and metric_info(name).unit == "%"
        }
        lines += [f"    {name:<44}{_shown(name, value):>8}" for name, value in shown.items()]
    return lines


def _cut(line: str) -> str:
    """Return a line of at most COLUMNS characters, cut after a comma."""
    return line if len(line) <= COLUMNS else line[: line.rfind(",", 0, COLUMNS + 1)]
