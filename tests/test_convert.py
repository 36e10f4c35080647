"""tools/convert_checkpoint.py: there and back is the same, and what differs is named."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, run_python
from tests.tiny import published_model, save

pytestmark = pytest.mark.slow  # no torchrun, but each call of the tool loads Megatron
TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    save(published_model(tied=request.param), folder / "hf")
    there = run_python(TOOL, "hf-to-megatron", folder / "hf", folder / "megatron")
    assert there.returncode == 0, there.stderr
    return folder


def test_there_and_back_is_bit_equal(folder):
    back = run_python(TOOL, "megatron-to-hf", folder / "megatron", folder / "back")
    assert back.returncode == 0, back.stderr
    first = load_file(folder / "hf" / "model.safetensors")
    second = load_file(folder / "back" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = (folder / "hf" / "config.json").read_text()
    assert (folder / "back" / "config.json").read_text() == config


def test_verify_says_which_tensor_differs(folder, tmp_path):
    same = run_python(TOOL, "verify", folder / "hf", folder / "megatron")
    assert same.returncode == 0
    assert same.stdout.endswith("tensors are bit-equal\n")
    other = shutil.copytree(folder / "hf", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    differs = run_python(TOOL, "verify", folder / "megatron", other)
    assert differs.returncode == 2
    assert differs.stderr.splitlines()[-1].startswith("error: 1 of ")
    assert differs.stderr.rstrip().endswith("first model.norm.weight.")


def test_an_existing_target_is_not_touched(folder):
    done = run_python(TOOL, "megatron-to-hf", folder / "megatron", folder / "hf")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "hf exists already: remove it or choose another directory."
    )
