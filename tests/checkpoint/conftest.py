"""A checkpoint of a tiny model in both formats, and a policy with its weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vrl.checkpoint.checkpoint import (
    load_weights,
)
from megatron_vrl.checkpoint.convert import convert_to_megatron
from megatron_vrl.config import Model, Parallel
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.parallel.mesh import close_mesh, init_mesh
from megatron_vrl.policy.policy import Policy
from tests.tiny_models import hf_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensor ranks do not divide its words: what they add must not be resharded as weights."""
    return save(hf_model(vocab=95), tmp_path_factory.mktemp("checkpoint") / "hf")


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> Path:
    convert_to_megatron(checkpoint, checkpoint.parent / "megatron")
    return checkpoint.parent / "megatron"


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Iterator[Policy]:
    mesh = init_mesh(Parallel(), seed=1)
    cfg = Model(checkpoint=str(checkpoint), dtype="float32")
    policy = Policy(read_architecture(checkpoint), cfg, Parallel(), mesh)
    load_weights(checkpoint, policy)
    yield policy
    close_mesh()
