"""Small line charts as inline SVG, in the page's colours (light and dark mode).

matplotlib needs real colours. Each placeholder colour of COLOURS and SHADES is replaced by a CSS
variable of style.css.j2 in the finished SVG. The page draws the legend, with the colours of
CATEGORIES.
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
# placeholder colour -> CSS variable of style.css.j2
COLOURS = {"#000101": "var(--ink)", "#000102": "var(--faint)", "#000103": "var(--model)"}
INK, FAINT, SERIES = COLOURS
SMOOTHED_FROM = 20  # minimum number of points for a moving average


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric over steps."""

    title: str
    unit: str
    steps: list[int]
    values: list[float]


def chart_font() -> AbstractContextManager[None]:
    """Return a matplotlib context that keeps text as text, in the font size of the page."""
    return matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8.5})


def svg(curve: Curve) -> str:
    """Return an <svg> element with raw values and a centred moving average.

    The average is over a tenth of the values, and drawn from SMOOTHED_FROM values on.
    """
    with chart_font():
        figure = Figure(figsize=(4.4, 2.1), layout="constrained")
        axes = figure.subplots()
        smoothed = len(curve.values) >= SMOOTHED_FROM
        mark = "o" if len(curve.values) < SMOOTHED_FROM else None
        axes.plot(
            curve.steps, curve.values, color=FAINT if smoothed else SERIES, lw=1, marker=mark, ms=3
        )
        if smoothed:
            axes.plot(curve.steps, _smooth(curve.values), color=SERIES, lw=1.6)
        plain_axes(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return to_svg(figure, f"{curve.title}, last {curve.values[-1]:.3g}")


def plain_axes(axes: Axes, lines: Literal["x", "y"] = "y") -> None:
    """Remove all spines but the bottom one, and draw faint grid lines on one axis."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis=lines, color=FAINT, lw=0.4)
    axes.set_axisbelow(True)


def to_svg(figure: Figure, label: str) -> str:
    """Return the figure as an <svg> element that fills its container.

    Call it within chart_font().
    """
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
    """Return the centred moving average."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
