"""One page on a selection: kept and dropped by task and reason, and how the answers spread."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_vrl.errors import counted
from megatron_vrl.observe.charts import CATEGORIES, INK, SHADES, chart_font, quiet_axes, themed
from megatron_vrl.observe.page import render

PART = {"multiple_choice": "accuracy"}  # whose spread is drawn; temporal IoU for the others
KEPT = "kept"
MARKS = {"kept": 0, "dropped": 4}  # numbers of colours
Rows = Sequence[dict[str, Any]]


def selection_report(summary: dict[str, Any], rows: Rows) -> str:
    """Return HTML without references to other files. `rows` as in stats.jsonl."""
    names = sorted({name for of_task in summary["verdicts"].values() for name in of_task})
    numbers = {name: min(n, 9) for n, name in enumerate(sorted(names, key=lambda n: n != KEPT))}
    if KEPT not in names:  # its colour is of nothing else
        numbers = {name: min(n + 1, 9) for name, n in numbers.items()}
    tasks = sorted({row["task"] for row in rows})
    with chart_font():
        return render(
            "selection.html.j2",
            title=f"Kept {summary['kept']} of {counted(summary['answered'], 'sample')}",
            summary=summary,
            colours={name: CATEGORIES[number] for name, number in numbers.items()},
            marks={name: CATEGORIES[number] for name, number in MARKS.items()},
            bars=_bars(summary["verdicts"], numbers),
            spreads=[(task, _part(task), _spread(task, rows)) for task in tasks],
        )


def _part(task: str) -> str:
    return PART.get(task, "temporal_iou")


def _bars(verdicts: dict[str, dict[str, int]], numbers: dict[str, int]) -> str:
    """Return one bar for each task, cut by verdict; `numbers` are those of the colours."""
    figure = Figure(figsize=(7, 0.7 + 0.4 * len(verdicts)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(verdicts, 0)
    for name, number in numbers.items():
        counts = [verdicts[task].get(name, 0) for task in verdicts]
        axes.barh(list(verdicts), counts, left=list(left.values()), color=SHADES[number])
        left = {task: left[task] + n for task, n in zip(verdicts, counts, strict=True)}
    axes.set_xlabel("samples", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    quiet_axes(axes, "x")
    told = "; ".join(
        f"{task}: {', '.join(f'{name} {count}' for name, count in of_task.items())}"
        for task, of_task in verdicts.items()
    )
    return themed(figure, f"samples by task and verdict; {told}")


def _spread(task: str, rows: Rows) -> str:
    """Return mean and standard deviation of the part that the task's rule reads."""
    part = _part(task)
    figure = Figure(figsize=(4.4, 2.8), layout="constrained")
    axes = figure.subplots()
    found = [row for row in rows if row["task"] == task and part in row["parts"]]
    for mark, number in reversed(MARKS.items()):
        shown = [r["parts"][part] for r in found if (r["verdict"] == KEPT) == (mark == KEPT)]
        axes.scatter(
            [s["mean"] for s in shown], [s["std"] for s in shown], s=8, color=SHADES[number]
        )
    axes.set_xlabel(f"mean {part}", color=INK)
    axes.set_ylabel("standard deviation", color=INK)
    quiet_axes(axes)
    return themed(figure, f"{task}: mean and standard deviation of {counted(len(found), 'sample')}")
