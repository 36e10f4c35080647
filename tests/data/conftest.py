"""Fixtures: files of a released checkpoint, without weights."""

import sys
from pathlib import Path

import pytest

from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops
from tests.running import ROOT

declare_missing_ops()
sys.path.append(str(ROOT / "tools"))

from make_tiny_model import CHAT_TEMPLATE, make_config, parse, train_tokenizer  # noqa: E402
from released_layout import write_released  # noqa: E402


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all files of the tiny model except the weights."""
    directory = tmp_path_factory.mktemp("chat") / "released"
    directory.mkdir()
    tokenizer = train_tokenizer(512)
    config = make_config(parse([f"--out={directory}"]), tokenizer)
    write_released(directory, config, tokenizer, CHAT_TEMPLATE, (784, 784))
    return directory
