"""HTML page about a data selection: samples by task and verdict, and the spread of rewards."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_vrl.errors import counted
from megatron_vrl.observe.charts import CATEGORIES, INK, SHADES, chart_font, plain_axes, to_svg
from megatron_vrl.observe.page import render
from megatron_vrl.tasks import TASKS

KEPT = "kept"
MARKS = {"kept": 0, "dropped": 4}  # index of the colour
Rows = Sequence[dict[str, Any]]


def selection_report(summary: dict[str, Any], rows: Rows) -> str:
    """Return a self-contained HTML page. `rows` are those of stats.jsonl."""
    names = sorted({name for of_task in summary["verdicts"].values() for name in of_task})
    colours = {name: min(n, 9) for n, name in enumerate(sorted(names, key=lambda n: n != KEPT))}
    if KEPT not in names:  # reserve colour 0 for "kept"
        colours = {name: min(n + 1, 9) for name, n in colours.items()}
    tasks = sorted({row["task"] for row in rows})
    with chart_font():
        return render(
            "selection.html.j2",
            title=f"Kept {summary['kept']} of {counted(summary['answered'], 'sample')}",
            summary=summary,
            colours={name: CATEGORIES[number] for name, number in colours.items()},
            marks={name: CATEGORIES[number] for name, number in MARKS.items()},
            bars=_bars(summary["verdicts"], colours),
            spreads=[(task, _drawn(task), _spread(task, rows)) for task in tasks],
        )


def _drawn(task: str) -> str:
    """Return the component whose spread is drawn: the first graded one, else the first."""
    kinds = TASKS[task].correctness
    return next((name for name, kind in kinds.items() if kind == "graded"), next(iter(kinds)))


def _bars(verdicts: dict[str, dict[str, int]], colours: dict[str, int]) -> str:
    """Return one stacked bar per task, split by verdict.

    `colours` maps a verdict to its colour index.
    """
    figure = Figure(figsize=(7, 0.7 + 0.4 * len(verdicts)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(verdicts, 0)
    for name, number in colours.items():
        counts = [verdicts[task].get(name, 0) for task in verdicts]
        axes.barh(list(verdicts), counts, left=list(left.values()), color=SHADES[number])
        left = {task: left[task] + n for task, n in zip(verdicts, counts, strict=True)}
    axes.set_xlabel("samples", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    plain_axes(axes, "x")
    label = "; ".join(
        f"{task}: {', '.join(f'{name} {count}' for name, count in of_task.items())}"
        for task, of_task in verdicts.items()
    )
    return to_svg(figure, f"samples by task and verdict; {label}")


def _spread(task: str, rows: Rows) -> str:
    """Return a scatter plot: mean and standard deviation of the task's drawn component."""
    component = _drawn(task)
    figure = Figure(figsize=(4.4, 2.8), layout="constrained")
    axes = figure.subplots()
    task_rows = [row for row in rows if row["task"] == task and component in row["components"]]
    for mark, number in reversed(MARKS.items()):
        shown = [
            r["components"][component]
            for r in task_rows
            if (r["verdict"] == KEPT) == (mark == KEPT)
        ]
        axes.scatter(
            [s["mean"] for s in shown], [s["std"] for s in shown], s=8, color=SHADES[number]
        )
    axes.set_xlabel(f"mean {component}", color=INK)
    axes.set_ylabel("standard deviation", color=INK)
    plain_axes(axes)
    return to_svg(
        figure, f"{task}: mean and standard deviation of {counted(len(task_rows), 'sample')}"
    )
