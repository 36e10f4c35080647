"""The rows of a pool's answers: whole blocks are kept, and the others are answered again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.selection.answers import json_lines, resume

BLOCKS = [["a", "b", "c"], ["d", "e", "f"], ["g"]]
ROWS = [{"id": name, "answers": []} for block in BLOCKS for name in block]


@given(st.integers(0, len(ROWS)), st.booleans(), st.sets(st.sampled_from("abcdefg")))
def test_whole_blocks_without_stale_samples_are_kept(
    tmp_path_factory: pytest.TempPathFactory, lines: int, torn: bool, stale: set[str]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "answers-0.jsonl"
    path.write_text(json_lines(ROWS[:lines]) + ('{"id": "z", "ta' if torn else ""))
    written = {row["id"] for row in ROWS[:lines]}
    expected = [n for block in BLOCKS if {*block} <= written - stale for n in block]
    assert list(resume(path, BLOCKS, stale)) == expected
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == expected
    assert list(resume(path, BLOCKS)) == expected  # and nothing more is lost


def test_rows_hold_numbers_only() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_lines([{"id": "a", "reward": float("nan")}])
