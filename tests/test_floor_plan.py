"""The house's floors: imports go down only, each heavy library has one owner, files stay short.

A new module needs a line in FLOORS; the longest matching name decides.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_vrl"
FLOORS = {
    # 5 programs
    "megatron_vrl.__main__": 5,
    "megatron_vrl.cli": 5,
    # 4 composition
    "megatron_vrl.context": 4,
    "megatron_vrl.trainer": 4,
    "megatron_vrl.evaluation": 4,
    "megatron_vrl.selection": 4,
    "megatron_vrl.planner": 4,
    "megatron_vrl.rehearsal": 4,
    "megatron_vrl.rollout.manager": 4,
    "megatron_vrl.rollout.weight_sync": 4,
    "megatron_vrl.data.dataset_check": 4,
    # 3 engines; siblings do not import each other, see SIBLINGS
    "megatron_vrl.video": 3,
    "megatron_vrl.data": 3,
    "megatron_vrl.models": 3,
    "megatron_vrl.policy": 3,
    "megatron_vrl.checkpoint": 3,
    "megatron_vrl.rollout": 3,
    # 2 services
    "megatron_vrl.parallel": 2,
    "megatron_vrl.observe": 2,
    "megatron_vrl.rewards.manager": 2,
    "megatron_vrl.rewards.user_functions": 2,
    # 1 pure logic
    "megatron_vrl.tasks": 1,
    "megatron_vrl.rewards": 1,
    "megatron_vrl.algorithms": 1,
    "megatron_vrl.batching": 1,
    "megatron_vrl.video.rules": 1,
    "megatron_vrl.evaluation.average_precision": 1,
    "megatron_vrl.evaluation.free_text": 1,
    "megatron_vrl.evaluation.grading": 1,
    "megatron_vrl.evaluation.lmms_eval": 1,
    "megatron_vrl.evaluation.metrics": 1,
    "megatron_vrl.evaluation.protocols": 1,
    "megatron_vrl.evaluation.temporal_r1": 1,
    "megatron_vrl.selection.draw": 1,
    "megatron_vrl.selection.rules": 1,
    # 0 foundations
    "megatron_vrl.types": 0,
    "megatron_vrl.errors": 0,
    "megatron_vrl.config": 0,
    "megatron_vrl.storage": 0,
    "megatron_vrl.process": 0,
}
SIBLINGS = {  # on floor 3: who may import whom
    ("policy", "models"),
    ("checkpoint", "models"),
    ("checkpoint", "policy"),
}
SHARED = {  # descriptions of model families, which every engine reads
    "megatron_vrl.models.architecture",
    "megatron_vrl.models.families",
    "megatron_vrl.models.family",
}
OWNERS = {
    "megatron": {"models", "policy", "checkpoint", "parallel"},
    "vllm": {"rollout"},
    "nvidia": {"video"},
    "wandb": {"observe"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
LIGHT = ["megatron_vrl", *(f"megatron_vrl.{name}" for name in ("config", "tasks", "rewards"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    matching = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    assert matching, f"{module} stands on no floor; add it to FLOORS in tests/test_floor_plan.py"
    return FLOORS[max(matching, key=len)]


def imports_of(path: Path) -> set[str]:
    """Full names of imported modules; `from package import name` counts as package.name."""
    modules = {module_of(file) for file in FILES}
    names_imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names_imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            names_imported |= {name if name in modules else str(node.module) for name in names}
    return names_imported


def complaint(module: str, imported: str) -> str:
    """Why `module` may not import `imported`; "" when it may."""
    floor, below = floor_of(module), floor_of(imported)
    if imported in SHARED and floor == 3:
        return ""
    if below > floor:
        return f"{module} (floor {floor}) imports {imported} (floor {below})"
    folder, other = module.split(".")[1], imported.split(".")[1]
    if floor == below == 3 and folder != other and (folder, other) not in SIBLINGS:
        return f"{module} imports its sibling {imported}"
    return ""


def test_the_rule_itself() -> None:
    assert complaint("megatron_vrl.rewards.temporal_r1", "megatron_vrl.policy.policy")
    assert complaint("megatron_vrl.video.rules", "megatron_vrl.video.dali")
    assert complaint("megatron_vrl.rollout.vllm.engine", "megatron_vrl.checkpoint.hf_load")
    assert complaint("megatron_vrl.models.layers", "megatron_vrl.policy.policy")
    assert complaint("megatron_vrl.data.prompt", "megatron_vrl.models.qwen2_5_vl.prompt")
    assert not complaint("megatron_vrl.data.prompt", "megatron_vrl.models.families")
    assert not complaint("megatron_vrl.policy.policy", "megatron_vrl.models.layers")
    assert not complaint("megatron_vrl.data.prompt", "megatron_vrl.video.rules")
    assert not complaint("megatron_vrl.cli.train", "megatron_vrl.context")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down_only(path: Path) -> None:
    module = module_of(path)
    if module == PACKAGE:
        assert not imports_of(path)  # `import megatron_vrl` costs nothing
        return
    ours = [name for name in imports_of(path) if name.startswith(PACKAGE + ".")]
    assert [why for name in sorted(ours) if (why := complaint(module, name))] == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_libraries_have_one_owner(path: Path) -> None:
    folder = path.relative_to(ROOT / PACKAGE).parts[0]
    for imported in imports_of(path):
        library = imported.split(".")[0]
        if library in OWNERS:
            assert folder in OWNERS[library], f"{folder} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


@pytest.mark.parametrize("module", LIGHT)
def test_pure_logic_starts_without_heavy_libraries(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert PACKAGE in loaded
    assert not loaded & {"torch", "megatron", "vllm", "nvidia", "wandb", "transformers", "av"}
