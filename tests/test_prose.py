"""Docstrings of package and tools begin with what a thing does or is: "Return ...", "LRU cache of".

A beginning with a preposition, a pronoun or a question word leaves the reader to guess the subject.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEGINNING = re.compile(
    r"(About|Above|After|Against|Along|Among|As|At|Before|Behind|Below|Beneath|Beside|Between|Beyond"
    r"|By|Down|During|For|From|In|Inside|Into|Of|Off|On|Onto|Out|Outside|Over|Past|Since|Through|To"
    r"|Towards?|Under|Until|Up|Upon|Via|With|Within|Without|The same|Their|Those"
    r"|What|Which|Whether|Where|When|How|Who|They)\b"
)
FILES = sorted(
    file for folder in ("megatron_vrl", "tools", "tests") for file in (ROOT / folder).rglob("*.py")
)


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and first line of every docstring: modules, classes, functions, attributes."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip().split("\n")[0]


def offences(text: str) -> list[str]:
    return [f"line {at}: {line}" for at, line in docstrings(text) if BEGINNING.match(line)]


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("Of all ranks.", True),
        ("The same, on the GPU.", True),
        ("Their ends.", True),
        ("Offsets of every segment.", False),
        ("The samples of a step.", False),
        ("Format of a line.", False),
    ],
)
def test_the_rule_itself(line: str, refused: bool) -> None:
    function = f'def f():\n    """{line}"""\n'
    attribute = f'class C:\n    a: int\n    """{line}"""\n'
    for text in (f'"""{line}"""\n', function, attribute):
        assert bool(offences(text)) == refused


def test_docstrings_begin_with_what_a_thing_does_or_is() -> None:
    offences_by_file = {str(file.relative_to(ROOT)): offences(file.read_text()) for file in FILES}
    assert {file: lines for file, lines in offences_by_file.items() if lines} == {}
