"""HTML report of a data selection: samples kept and dropped, and the spread of their answers."""

import io
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from megatron_vrl.tasks import TASKS

STYLE = (
    ":root{color-scheme:light dark;--paper:#fdfcf9;--ink:#26241f}"
    "@media(prefers-color-scheme:dark){:root{--paper:#191816;--ink:#e4e0d8}"
    "svg{filter:invert(.9) hue-rotate(180deg)}}"
    "body{font:16px/1.55 Charter,Georgia,serif;max-width:58rem;margin:0 auto;"
    "padding:3.5rem 1.25rem 5rem;background:var(--paper);color:var(--ink)}"
    "h1{font-size:2rem;font-weight:500}h2{font-size:1.2rem;font-weight:500;margin-top:3.5rem}"
    "table{border-collapse:collapse}td,th{padding:.15rem .8rem;text-align:left}"
    "td:last-child{text-align:right}svg{max-width:100%;height:auto}"
)


def selection_report(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return a self-contained HTML page. `summary` is summary.json, `rows` are of stats.jsonl."""
    rules = ", ".join(f"{key} {value}" for key, value in summary["rules"].items())
    tables = "".join(
        f"<tr><td>{escape(task)}</td><td>{escape(verdict)}</td><td>{count}</td></tr>"
        for task, verdicts in summary["verdicts"].items()
        for verdict, count in verdicts.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Selection</title><style>{STYLE}</style>"
        f"<h1>Kept {summary['kept']} of {summary['answered']} samples</h1>"
        f"<p>{summary['pool']} samples in the pool. Rules: {escape(rules)}.</p>"
        f"{_svg(_bars(summary['verdicts']))}"
        f"<table><tr><th>task<th>verdict<th>samples</tr>{tables}</table>"
        f"<h2>Mean and spread of each sample's answers</h2>{_svg(_spreads(rows))}"
    )


def _bars(verdicts: dict[str, dict[str, int]]) -> Figure:
    """Return a bar chart: samples of each task by verdict, the kept ones first."""
    names = sorted({name for of_task in verdicts.values() for name in of_task})
    names.sort(key=lambda name: name != "kept")
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(verdicts)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(verdicts, 0)
    for name in names:
        counts = [verdicts[task].get(name, 0) for task in verdicts]
        axes.barh(list(verdicts), counts, left=list(left.values()), label=name)
        left = {task: left[task] + n for task, n in zip(verdicts, counts, strict=True)}
    axes.set_xlabel("samples")
    figure.legend(fontsize=7, ncols=3, loc="outside lower left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _spreads(rows: Sequence[dict[str, Any]]) -> Figure:
    """Return one panel for each task: mean and standard deviation of its drawn component."""
    tasks = sorted({row["task"] for row in rows})
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        component = _drawn(task)
        for kept, colour, label in ((False, "0.6", "dropped"), (True, "C0", "kept")):
            found = [
                row["components"][component]
                for row in rows
                if row["task"] == task
                and component in row["components"]
                and (row["verdict"] == "kept") == kept
            ]
            axes.scatter(
                [s["mean"] for s in found], [s["std"] for s in found], s=8, c=colour, label=label
            )
        axes.set(title=task, xlabel=f"mean {component}", ylabel="standard deviation")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7)
    return figure


def _drawn(task: str) -> str:
    """Return the component whose spread is drawn: the first graded one, else the first."""
    kinds = TASKS[task].correctness
    return next((name for name, kind in kinds.items() if kind == "graded"), next(iter(kinds)))


def _svg(figure: Figure) -> str:
    """Return the figure as an <svg> element."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
