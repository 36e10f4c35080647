"""Private parts of vLLM: the installed version has every listed one, and nothing else is used."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

from megatron_vrl.errors import RolloutError
from megatron_vrl.rollout.vllm.compat import (
    PRIVATE_PARTS,
    SUPPORTED_VERSIONS,
    PrivatePart,
    check_private_parts,
)

FOLDER = Path(__file__).parents[3] / "megatron_vrl" / "rollout" / "vllm"
OWN = {"self", "cls"}  # names whose private attributes are this package's


@pytest.fixture(scope="module")
def vllm() -> ModuleType:
    from megatron_vrl.rollout.vllm.startup import import_vllm

    return import_vllm()


@pytest.mark.slow  # imports vLLM
@pytest.mark.parametrize(
    "part", PRIVATE_PARTS, ids=lambda part: part.variable or part.location.rpartition(".")[2]
)
def test_the_installed_vllm_has_it(vllm: ModuleType, part: PrivatePart) -> None:
    assert part.missing() == ""
    assert vllm.__version__.partition("+")[0] in SUPPORTED_VERSIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "missing"),
    [
        (PrivatePart("vllm.nowhere:name", "x"), "vllm.nowhere:name"),
        (PrivatePart("vllm._custom_ops:_nothing", "x"), "vllm._custom_ops:_nothing"),
        (
            PrivatePart("vllm.outputs:CompletionOutput", "x", sets="other_name: "),
            "vllm.outputs:CompletionOutput with other_name: ",
        ),
        (
            PrivatePart("vllm.envs:environment_variables", "x", variable="VLLM_NO_SUCH"),
            "VLLM_NO_SUCH",
        ),
    ],
)
def test_a_missing_part_is_noticed(vllm: ModuleType, part: PrivatePart, missing: str) -> None:
    assert part.missing() == missing


@pytest.mark.slow
def test_another_version_is_refused_with_one_sentence(
    vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_private_parts()
    monkeypatch.delattr("vllm._custom_ops._supports_onednn")
    sentence = (
        f"vLLM {vllm.__version__} has no vllm._custom_ops:_supports_onednn, which turns weight "
        f"packing for oneDNN off: install vLLM {' or '.join(SUPPORTED_VERSIONS)}."
    )
    with pytest.raises(RolloutError, match=re.escape(sentence)):
        check_private_parts()


@pytest.mark.parametrize(
    "path", [path for path in FOLDER.glob("*.py") if path.stem != "compat"], ids=lambda p: p.stem
)
def test_only_compat_uses_underscored_names_of_others(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else ast.unparse(node.value)
            assert owner in OWN, f"{path.name}:{node.lineno} reads {owner}.{node.attr}"
