"""Small line charts as inline SVG; colours are the page's, so dark mode is theirs too."""

import io
import re
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# matplotlib wants real colours; each stands for a CSS variable of report.html.j2.
COLOURS = {"#000101": "var(--ink)", "#000102": "var(--faint)", "#000103": "var(--model)"}
INK, FAINT, SERIES = COLOURS
SMOOTHED_FROM = 20  # with fewer points the raw line is the clearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    title: str
    unit: str
    steps: list[int]
    values: list[float]


def svg(curve: Curve) -> str:
    """An <svg> element: raw values, and the centred moving average over a tenth of them."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8.5}):
        figure = Figure(figsize=(4.4, 2.1), layout="constrained")
        axes = figure.subplots()
        noisy = len(curve.values) >= SMOOTHED_FROM
        mark = "o" if len(curve.values) < SMOOTHED_FROM else None
        axes.plot(
            curve.steps, curve.values, color=FAINT if noisy else SERIES, lw=1, marker=mark, ms=3
        )
        if noisy:
            axes.plot(curve.steps, _smooth(curve.values), color=SERIES, lw=1.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
        axes.tick_params(length=0, colors=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color=FAINT, lw=0.4)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _themed(out.getvalue(), curve)


def _smooth(values: list[float]) -> list[float]:
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _themed(text: str, curve: Curve) -> str:
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'height="[^"]*"', "", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px inherit; font-family: inherit", text)
    last = f"{curve.values[-1]:.3g}"
    return text.replace("<svg ", f'<svg role="img" aria-label="{curve.title}, last {last}" ', 1)
