"""Docstrings of package and tools begin with what a thing does or is: "Return ...", "LRU cache of".

A beginning with a preposition or a pronoun leaves the reader to guess the subject. STILL_OFFEND
lists files that still have such docstrings; remove a file from the list when it has none.
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
    r"|Towards?|Under|Until|Up|Upon|Via|With|Within|Without|The same|Their|Those)\b"
)
FILES = sorted(
    file for folder in ("megatron_vrl", "tools") for file in (ROOT / folder).rglob("*.py")
)
STILL_OFFEND = frozenset(
    {
        "megatron_vrl/algorithms/combine.py",
        "megatron_vrl/batching/balance.py",
        "megatron_vrl/batching/pack.py",
        "megatron_vrl/checkpoint/checksums.py",
        "megatron_vrl/config/rollout.py",
        "megatron_vrl/data/dataset_check.py",
        "megatron_vrl/data/formats/records.py",
        "megatron_vrl/data/mix.py",
        "megatron_vrl/data/schedule.py",
        "megatron_vrl/evaluation/ask.py",
        "megatron_vrl/evaluation/grading.py",
        "megatron_vrl/evaluation/logprobs.py",
        "megatron_vrl/evaluation/protocols.py",
        "megatron_vrl/models/fp8_emulation.py",
        "megatron_vrl/models/fp8_monitor.py",
        "megatron_vrl/models/layers.py",
        "megatron_vrl/models/qwen2_5_vl/flops.py",
        "megatron_vrl/models/qwen2_5_vl/model.py",
        "megatron_vrl/models/qwen2_5_vl/vision.py",
        "megatron_vrl/models/segments.py",
        "megatron_vrl/observe/report.py",
        "megatron_vrl/observe/summary.py",
        "megatron_vrl/planner/activations.py",
        "megatron_vrl/planner/generation.py",
        "megatron_vrl/planner/hardware.py",
        "megatron_vrl/planner/memory.py",
        "megatron_vrl/planner/parameters.py",
        "megatron_vrl/planner/plan.py",
        "megatron_vrl/planner/render.py",
        "megatron_vrl/planner/search.py",
        "megatron_vrl/planner/speed.py",
        "megatron_vrl/planner/workload.py",
        "megatron_vrl/rewards/manager.py",
        "megatron_vrl/rollout/buckets.py",
        "megatron_vrl/rollout/checksums.py",
        "megatron_vrl/rollout/manager.py",
        "megatron_vrl/rollout/records.py",
        "megatron_vrl/rollout/replay.py",
        "megatron_vrl/rollout/request.py",
        "megatron_vrl/rollout/vllm/engine.py",
        "megatron_vrl/rollout/vllm/in_process.py",
        "megatron_vrl/rollout/vllm/start.py",
        "megatron_vrl/rollout/vllm/weight_router.py",
        "megatron_vrl/rollout/workers/protocol.py",
        "megatron_vrl/rollout/workers/weight_sender.py",
        "megatron_vrl/selection/rules.py",
        "megatron_vrl/trainer/dataloader.py",
        "megatron_vrl/trainer/experience.py",
        "megatron_vrl/trainer/grpo_overlapped.py",
        "megatron_vrl/trainer/reselect.py",
        "megatron_vrl/trainer/rollout_files.py",
        "megatron_vrl/trainer/sample_stream.py",
        "megatron_vrl/trainer/state.py",
        "megatron_vrl/video/fetch.py",
        "megatron_vrl/video/image.py",
        "megatron_vrl/video/reader.py",
    }
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
def test_the_rule_itself(line, refused):
    function = f'def f():\n    """{line}"""\n'
    attribute = f'class C:\n    a: int\n    """{line}"""\n'
    for text in (f'"""{line}"""\n', function, attribute):
        assert bool(offences(text)) == refused


def test_docstrings_begin_with_what_a_thing_does_or_is():
    found = {str(file.relative_to(ROOT)): offences(file.read_text()) for file in FILES}
    assert {
        file: lines for file, lines in found.items() if lines and file not in STILL_OFFEND
    } == {}
