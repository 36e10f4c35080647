"""A small quickstart to run the main job on."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests import warm
from tests.running import ENVIRONMENT, ROOT, run_python

settings.register_profile("untimed", deadline=None)  # a busy machine is not a failure
settings.load_profile("untimed")


def pytest_report_header() -> str:
    """Name the kernels that this machine computes with: last bits differ between them."""
    import torch

    openblas = os.environ.get("OPENBLAS_CORETYPE", "not set")
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"kernels: torch {torch.__version__} {capability}, oneDNN "
        f"{torch.backends.mkldnn.is_available()}, {torch.get_num_threads()} threads, "
        f"OPENBLAS_CORETYPE {openblas}"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Slow tests start many programs."""
    slow = any(item.get_closest_marker("slow") for item in session.items)
    if slow and not session.config.option.collectonly:
        warm.start(ENVIRONMENT)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run the quickstart's config in: its `runs/quickstart` holds what
    launch/quickstart.sh makes before training, with 50 clips."""
    folder = tmp_path_factory.mktemp("main-job")
    run = folder / "runs" / "quickstart"
    run.mkdir(parents=True)
    splits = {"sft": 20, "train": 15, "dev": 5, "heldout": 5, "ood": 5}
    sizes = [word for name, size in splits.items() for word in ("--split", f"{name}={size}")]
    tools = ROOT / "tools"
    for arguments in (
        [tools / "make_synthetic.py", "--out", run / "data", *sizes],
        [tools / "make_tiny_model.py", "--out", run / "model-hf"],
        [
            tools / "convert_checkpoint.py",
            "hf-to-megatron",
            run / "model-hf",
            run / "model-megatron",
        ],
    ):
        done = run_python(*arguments)
        assert done.returncode == 0, done.stderr
    return folder
