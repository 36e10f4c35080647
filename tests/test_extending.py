"""docs/extending.md: every example is applied to a copy of the package, run, and compared."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.running import ENVIRONMENT, ROOT, python

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_has_its_five_examples() -> None:
    assert list(SECTIONS) == [
        "A task: counting",
        "A reward function",
        "An algorithm",
        "A dataset format",
        "A decoder",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_an_example_gives_what_the_page_says(title: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megatron_vrl", tmp_path / "megatron_vrl")
    blocks = BLOCK.findall(SECTIONS[title])
    assert {"python", "yaml", "text"} <= {language for language, _, _ in blocks}
    for language, note, text in blocks:
        if note.startswith("file="):
            path = tmp_path / note.removeprefix("file=")
            assert not path.exists()
            path.write_text(text)
        elif language == "diff":
            apply(text, tmp_path)
    (program,) = [text for _, note, text in blocks if note == "run"]
    (expected,) = [text for language, _, text in blocks if language == "text"]
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def apply(diff: str, root: Path) -> None:
    """Apply a diff without line numbers: lines of context and removed lines are unique in a file.

    Added lines stand after the line before them, those at the beginning before the next line.
    """
    for name, body in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.MULTILINE | re.DOTALL):
        lines = (root / name).read_text().splitlines()
        at, first = -1, list[str]()
        for line in body.splitlines():
            mark, text = line[:1], line[1:]
            if mark == "+" and at < 0:
                first.append(text)
            elif mark == "+":
                lines.insert(at, text)
                at += 1
            else:
                at = only(lines, text, name)
                lines[at:at] = first
                at, first = at + len(first), []
                if mark == "-":
                    del lines[at]
                else:
                    at += 1
        (root / name).write_text("\n".join(lines) + "\n")


def only(lines: list[str], text: str, name: str) -> int:
    assert lines.count(text) == 1, f"{name} has the line {text!r} {lines.count(text)} times"
    return lines.index(text)


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "example.py"
    path.write_text(program)
    return subprocess.run(
        [python(), str(path)],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
