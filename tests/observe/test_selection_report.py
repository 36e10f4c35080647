"""Selection page: style of the run report, a legend beside the chart, every verdict visible."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from megatron_vrl.observe import selection_report as module
from megatron_vrl.observe.report import build_report
from megatron_vrl.observe.selection_report import selection_report

HOSTILE = "<script>alert(1)</script>"
VERDICTS = {
    "temporal_grounding": {"kept": 5, "spread but poor": 3, HOSTILE: 1},
    "multiple_choice": {"all right": 2, "all wrong": 7},
}


def row(task: str, verdict: str) -> dict[str, Any]:
    part = "accuracy" if task == "multiple_choice" else "temporal_iou"
    return {"task": task, "verdict": verdict, "components": {part: {"mean": 0.4, "std": 0.2}}}


def page(verdicts: dict[str, dict[str, int]]) -> str:
    rows = [row(task, name) for task, of_task in verdicts.items() for name in of_task]
    rules = {"min_std": 0.05, "budget": 0}
    counts = {"pool": 20, "answered": 18, "kept": 5}
    return selection_report(counts | {"rules": rules, "verdicts": verdicts}, rows)


def style_of(text: str) -> str:
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    return str(style).strip()


def test_the_style_is_that_of_a_report(tmp_path: Path) -> None:
    line = '{"phase": "grpo", "step": 1, "reward/mean": 0.5, "timing_s": {"rollout": 1.0}}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    report, selection = build_report(tmp_path).read_text(), page(VERDICTS)
    assert style_of(report) == style_of(selection)
    assert "prefers-color-scheme: dark" in style_of(selection) and "@media print" in report
    for text in (report, selection):
        assert text.count('<meta name="viewport"') == 1


def test_every_verdict_has_a_colour_in_the_key_and_in_the_chart() -> None:
    text = page(VERDICTS)
    assert HOSTILE not in text and "Kept 5 of 18 samples" in text
    first, *_ = re.findall(r'<div class="key sans">.*?</div>', text)
    key = dict(re.findall(r"background:(.*?)\"></i>(.*?)</span>", first))
    assert len(key) == 5 and next(iter(key.values())) == "kept"
    bars, *spreads = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert all(colour in bars for colour in key) and len(spreads) == 2
    assert not re.search(r"#0001|#0002", text)  # each colour is the page's


def test_charts_are_svg_without_a_legend_over_an_axis() -> None:
    for image in re.findall(r"<svg.*?</svg>", page(VERDICTS), re.DOTALL):
        tree = ElementTree.fromstring(image)
        names = [each.get("id") or "" for each in tree.iter()]
        assert not [name for name in names if name.startswith("legend")]
        assert tree.get("role") == "img" and tree.get("aria-label")


def test_dropped_samples_never_have_the_colour_of_kept_ones() -> None:
    text = page({"temporal_grounding": {"spread but poor": 3}})
    first, *_ = re.findall(r'<div class="key sans">.*?</div>', text)
    assert "var(--p0)" not in first and module.KEPT not in first
