"""The tools as README writes them: run by their paths, with options that their parsers have."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.running import ENVIRONMENT, ROOT

TOOLS = [f for f in sorted((ROOT / "tools").glob("*.py")) if "__main__" in f.read_text()]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BESIDE_PYTHON = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"}


@pytest.fixture(scope="module")
def helps():
    """Name of a tool -> what its --help prints."""

    def asked(tool: Path) -> str:
        done = subprocess.run(
            [f"tools/{tool.name}", "--help"],
            cwd=ROOT,
            env=BESIDE_PYTHON,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        return dict(zip([tool.name for tool in TOOLS], pool.map(asked, TOOLS), strict=True))


def commands(page: Path) -> list[str]:
    """Lines of the page's code blocks that call a tool, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    blocks = re.findall(r"^    .*$|^```.*?^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition(" #")[0] for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r"\btools/\w+\.py +\S", line)]


def test_every_tool_runs_by_its_path(helps):
    assert all(text.startswith("usage: ") for text in helps.values())


def test_a_usage_is_said_once_and_every_option_has_a_word_of_help(helps):
    for name, text in helps.items():
        own = "launch/gpu_check.sh" if name == "gpu_check.py" else name
        calls = re.findall(rf"^(?:usage:)? +{own} .*", text, re.MULTILINE)
        assert calls and len(calls) == len(set(calls)), name
        options = re.split(r"^(?:options|positional arguments):\n", text, flags=re.MULTILINE)[1:]
        for entry in re.findall(r"^  \S.*(?:\n   .*)*", "\n".join(options), re.MULTILINE):
            assert re.search(r"\S(?:  +|\n +)\w", entry), f"{name}: {entry}"


def test_commands_of_the_pages_have_options_that_exist(helps):
    found = [(page.name, command) for page in PAGES for command in commands(page)]
    assert len(found) > 8
    unknown = []
    for page, command in found:
        name = re.search(r"\btools/(\w+\.py)", command)[1]
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", command.partition(name)[2])
        known = set(re.findall(r"--[a-z][\w-]*", helps[name]))
        unknown += [f"{page}: {name} {option}" for option in options if option not in known]
    assert unknown == []
