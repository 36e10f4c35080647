"""Small charts as inline SVG in the colours of the page, of its dark mode too.

Legends are the page's: `CATEGORIES` are the CSS colours that stand for `SHADES` in a figure.
"""

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

CATEGORIES = tuple(f"var(--p{number})" for number in range(10))
SHADES = tuple(f"#0002{number:02d}" for number in range(10))
# matplotlib wants real colours; each stands for a CSS variable of style.css.j2.
COLOURS = {"#000101": "var(--ink)", "#000102": "var(--faint)", "#000103": "var(--model)"}
INK, FAINT, SERIES = COLOURS
SMOOTHED_FROM = 20  # with fewer points the raw line is the clearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    title: str
    unit: str
    steps: list[int]
    values: list[float]


def chart_font() -> AbstractContextManager[None]:
    """Return a context in which text stays text, of the size that the pages have."""
    return matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8.5})


def svg(curve: Curve) -> str:
    """An <svg> element: raw values, and the centred moving average over a tenth of them."""
    with chart_font():
        figure = Figure(figsize=(4.4, 2.1), layout="constrained")
        axes = figure.subplots()
        noisy = len(curve.values) >= SMOOTHED_FROM
        mark = "o" if len(curve.values) < SMOOTHED_FROM else None
        axes.plot(
            curve.steps, curve.values, color=FAINT if noisy else SERIES, lw=1, marker=mark, ms=3
        )
        if noisy:
            axes.plot(curve.steps, _smooth(curve.values), color=SERIES, lw=1.6)
        quiet_axes(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return themed(figure, f"{curve.title}, last {curve.values[-1]:.3g}")


def quiet_axes(axes: Axes, lines: Literal["x", "y"] = "y") -> None:
    """Leave of the axes the lower line, numbers and faint lines at those of one axis."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis=lines, color=FAINT, lw=0.4)
    axes.set_axisbelow(True)


def themed(figure: Figure, label: str) -> str:
    """Return an <svg> element as wide as its place. Call it within chart_font()."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    for colour, variable in (COLOURS | dict(zip(SHADES, CATEGORIES, strict=True))).items():
        text = text.replace(colour, variable)
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'height="[^"]*"', "", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px inherit; font-family: inherit", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _smooth(values: list[float]) -> list[float]:
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
