"""docs/metrics.md names every metric that has a display title."""

import re
from pathlib import Path

import pytest

from megatron_vrl.observe.metrics import METRICS, metric_info
from megatron_vrl.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def documented() -> set[str]:
    """Return the names in the first column of the page's tables."""
    rows = (line for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


@pytest.mark.parametrize("name", [name for name in METRICS if name.split("/")[0] not in TASKS])
def test_a_metric_with_a_title_is_on_the_page(name: str) -> None:
    assert metric_info(name).title
    assert name in documented() or f"{name.split('/')[0]}/COMPONENT" in documented()
