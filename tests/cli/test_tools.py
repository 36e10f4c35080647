"""Commands and tools as the documentation calls them: by their names, with options that exist."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest

from megatron_vrl.__main__ import COMMANDS
from megatron_vrl.cli.plan import GPU_NAMES
from megatron_vrl.planner.hardware import GPUS
from tests.running import ENVIRONMENT, ROOT

TOOLS = [f for f in sorted((ROOT / "tools").glob("*.py")) if "__main__" in f.read_text()]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BESIDE_PYTHON = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"}
HEAVY = {"torch", "transformers", "megatron", "vllm", "nvidia", "wandb", "matplotlib"}
LOADED = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    if sys.argv[0].endswith(".py"):
        sys.path[0] = "tools"
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(*sys.modules, file=sys.stderr)
"""


def command_name(tool: str) -> str:
    """Return the command that a tool stands for: its module in megatron_vrl/cli; "" for none."""
    match = re.search(r"from megatron_vrl\.cli\.(\w+) import main", (ROOT / tool).read_text())
    return match[1].replace("_", "-") if match else ""


def help_of(program: str) -> tuple[str, set[str]]:
    """Return what `--help` of a tool's path or a module prints, and the libraries it loads."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, program],
        cwd=ROOT,
        env=BESIDE_PYTHON,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, {name.partition(".")[0] for name in done.stderr.split()}


@pytest.fixture(scope="module")
def asked() -> dict[str, tuple[str, set[str]]]:
    """Name of a command or tool -> what its --help prints, and the libraries it loads."""
    programs = {f"mvrl {name}": f"megatron_vrl.cli.{name.replace('-', '_')}" for name in COMMANDS}
    own = [tool for tool in TOOLS if not command_name(f"tools/{tool.name}")]
    programs |= {tool.name: f"tools/{tool.name}" for tool in own}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(programs, pool.map(help_of, programs.values()), strict=True))


@pytest.fixture(scope="module")
def helps(asked: dict[str, tuple[str, set[str]]]) -> dict[str, str]:
    """Name of a command or tool -> what its --help prints."""
    texts = {name: text for name, (text, _) in asked.items()}
    commands = {tool.name: command_name(f"tools/{tool.name}") for tool in TOOLS}
    return texts | {tool: texts[f"mvrl {name}"] for tool, name in commands.items() if name}


def calls(page: Path) -> list[tuple[str, str]]:
    """Return (program, arguments) of the calls in the page's code blocks."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    blocks = re.findall(r"^    .*$|^```.*?^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition(" #")[0] for block in blocks for line in block.splitlines()]
    call = re.compile(r"\btools/(\w+\.py) +(\S.*)|^ *(?:\$ )?(mvrl [a-z-]+)(.*)")
    matches = [match for line in lines if (match := call.search(line))]
    return [(match[1] or match[3], match[2] or match[4]) for match in matches]


def test_every_help_begins_with_the_usage(helps: dict[str, str]) -> None:
    assert len(helps) == len(COMMANDS) + len(TOOLS)
    assert all(text.startswith("usage: ") for text in helps.values())


def test_help_loads_no_heavy_library(asked: dict[str, tuple[str, set[str]]]) -> None:
    assert {name: heavy for name, (_, loaded) in asked.items() if (heavy := loaded & HEAVY)} == {}


def test_a_usage_is_printed_once_and_every_option_has_a_help_text(
    asked: dict[str, tuple[str, set[str]]],
) -> None:
    for name, (text, _) in asked.items():
        own = "launch/gpu_check.sh" if name == "gpu_check.py" else name
        lines = re.findall(rf"^(?:usage:)? +{own}\b.*", text, re.MULTILINE)
        assert lines and len(lines) == len(set(lines)), name
        options = re.split(r"^(?:options|positional arguments):\n", text, flags=re.MULTILINE)[1:]
        for entry in re.findall(r"^  \S.*(?:\n   .*)*", "\n".join(options), re.MULTILINE):
            assert re.search(r"\S(?:  +|\n +)\w", entry), f"{name}: {entry}"


def test_calls_of_the_pages_have_options_that_exist(helps: dict[str, str]) -> None:
    page_calls = [(page.name, *call) for page in PAGES for call in calls(page)]
    assert len(page_calls) > 8
    unknown = []
    for page, program, arguments in page_calls:
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", arguments)
        known = set(re.findall(r"--[a-z][\w-]*", helps[program]))
        unknown += [f"{page}: {program} {option}" for option in options if option not in known]
    assert unknown == []


def test_tools_run_by_their_paths() -> None:
    done = subprocess.run(
        ["tools/grade.py", "--help"], cwd=ROOT, env=BESIDE_PYTHON, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: mvrl grade ")


def test_nothing_changes_the_import_path() -> None:
    package = [file for folder in ("megatron_vrl", "tools") for file in (ROOT / folder).rglob("*")]
    texts = {file: file.read_text() for file in package if file.suffix == ".py"}
    assert [file.name for file, text in texts.items() if "sys.path" in text] == []


def test_every_command_has_a_module_and_the_planner_names_its_gpus() -> None:
    modules = {f"{name.replace('-', '_')}.py" for name in COMMANDS}
    assert modules == {file.name for file in (ROOT / "megatron_vrl/cli").glob("[a-z]*.py")}
    for name in COMMANDS:
        module = import_module(f"megatron_vrl.cli.{name.replace('-', '_')}")
        assert module.make_parser().prog == f"mvrl {name}"
    assert set(GPU_NAMES) == set(GPUS)
