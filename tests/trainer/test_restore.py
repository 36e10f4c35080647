"""A run that starts or resumes loads each file of weights once and parses annotations once."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_vrl.checkpoint import saver as saver_module
from megatron_vrl.checkpoint.checksums import ChecksumVerifier
from megatron_vrl.checkpoint.hf_load import hf_tensors
from megatron_vrl.checkpoint.saver import Saver
from megatron_vrl.config import Parallel, Source, load_config
from megatron_vrl.context import PolicyContext
from megatron_vrl.data import datasets
from megatron_vrl.data.datasets import Datasets
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.parallel.mesh import Mesh, close_mesh, init_mesh
from megatron_vrl.policy.policy import Policy
from megatron_vrl.trainer.restore import load_stage, restore
from megatron_vrl.trainer.state import RunState, checkpoint_name
from tests.running import CONFIG
from tests.tiny_models import hf_model, save

KL = "algorithm.kl=0.01"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield init_mesh(Parallel(), seed=1)
    close_mesh()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(), tmp_path_factory.mktemp("restore") / "hf")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name of every checkpoint that is loaded, with "+optimizer" where its state is."""
    loaded: list[str] = []
    for name, suffix in (("load_weights", ""), ("load_checkpoint", "+optimizer")):
        original = getattr(saver_module, name)

        def counted(
            checkpoint: Path | str,
            *rest: ChecksumVerifier | Policy,
            original: Callable[..., Any] = original,
            suffix: str = suffix,
        ) -> None:
            loaded.append(Path(checkpoint).name + suffix)
            original(checkpoint, *rest)

        monkeypatch.setattr(saver_module, name, counted)
    return loaded


class Process:
    """One process of a run in `root`."""

    def __init__(self, mesh: Mesh, base: Path, root: Path, *overrides: str) -> None:
        keys = [f"model.checkpoint={base}", "model.dtype=float32", "algorithm.kl=0", *overrides]
        self.cfg = load_config(CONFIG, keys)
        policy = Policy(read_architecture(base), self.cfg.model, self.cfg.parallel, mesh)
        saver = Saver(root / "checkpoints", policy, base, keep=9, asynchronous=False)
        self.trained = PolicyContext(mesh=mesh, policy=policy, saver=saver)

    def restored(self) -> RunState:
        result = restore(self.cfg, self.trained)
        load_stage(self.cfg, self.trained, result)
        return result.state

    def weights(self, value: float | None = None) -> dict[str, torch.Tensor]:
        """The weights, after `value` is added to each."""
        policy = self.trained.policy
        if value is not None:
            with torch.no_grad():
                for parameter in policy.chunks[0].parameters():
                    parameter.add_(value)
        return {name: tensor.clone() for name, tensor in hf_tensors(policy.chunks)}

    def save(self, stage: Literal["base", "sft", "grpo", "done"], step: int) -> None:
        state = {"stage": stage, "step": step, "version": step}
        self.trained.saver.save(checkpoint_name(stage, 0, step), state)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_new_run_and_a_new_stage_load_one_checkpoint(
    mesh: Mesh, base: Path, tmp_path: Path, loads: list[str]
) -> None:
    run = Process(mesh, base, tmp_path)
    assert run.restored() == RunState() and loads == [base.name]
    changed = run.weights(0.5)
    run.save("grpo", 0)
    loads.clear()
    again = Process(mesh, base, tmp_path)
    assert again.restored() == RunState(stage="grpo") and loads == ["grpo-0-000000"]
    assert equal(again.weights(), changed) and again.trained.policy.optimizer is None


@pytest.mark.parametrize(
    ("stage", "kl", "expected"),
    [
        ("sft", KL, ["sft-0-000002+optimizer"]),
        ("grpo", "algorithm.kl=0", ["grpo-0-000002+optimizer"]),
        ("grpo", KL, ["grpo-0-000000", "grpo-0-000002+optimizer"]),
    ],
)
def test_a_run_in_the_middle_of_a_stage_loads_each_file_once(
    mesh: Mesh,
    base: Path,
    tmp_path: Path,
    loads: list[str],
    stage: Literal["sft", "grpo"],
    kl: str,
    expected: list[str],
) -> None:
    run = Process(mesh, base, tmp_path, kl)
    run.restored()
    began = run.weights()
    run.save("grpo", 0)
    run.trained.policy.start_phase(run.cfg.grpo.optimizer, run.cfg.grpo.steps)
    trained = run.weights(0.5)
    run.save(stage, 2)
    loads.clear()
    again = Process(mesh, base, tmp_path, kl)
    state = again.restored()
    assert (state.stage, state.step, state.version) == (stage, 2, 2) and loads == expected
    assert equal(again.weights(), trained) and again.trained.policy.optimizer is not None
    reference = again.trained.policy._reference
    assert bool(reference) == (len(expected) == 2)
    if reference:
        assert equal(dict(hf_tensors(reference)), began)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, list[Source]]:
    """ "kept": durations are in the annotations; "header": a video has to be opened for one."""
    kept = {"v": {"duration": 16.0, "timestamps": [[3.0, 8.0]], "sentences": ["a square"]}}
    listed = {"dataset": "charades_train", "video": "v.mp4", "problem": "a", "solution": [0.2, 0.5]}
    by_name = {}
    form: Any
    for name, form, records in (
        ("kept", "charades_sta", kept),
        ("header", "temporal_r1", [listed]),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(records))
        by_name[name] = [Source(json_path=str(path), data_folder="v", format=form)]
    return by_name


def test_annotations_are_parsed_once_unless_a_video_has_to_be_opened(
    sources: dict[str, list[Source]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    for name in ("load", "open_pool"):
        original = getattr(datasets, name)

        def counted(
            of: list[Source],
            *rest: Any,
            original: Callable[..., Any] = original,
            name: str = name,
        ) -> Any:
            parsed.append(f"{name} {Path(of[0].json_path).stem}")
            return original(of, *rest)

        monkeypatch.setattr(datasets, name, counted)
    known = Datasets(seed=1)
    for length in (1.0, 12.0):  # of the start-up check, and of the run
        duration_s = lambda path, length=length: length  # noqa: E731
        samples = {name: known.load(of, duration_s) for name, of in sources.items()}
        pools = {name: known.open_pool(of, duration_s) for name, of in sources.items()}
    once = [f"{name} kept" for name in ("load", "open_pool")]
    twice = 2 * [f"{name} header" for name in ("load", "open_pool")]
    assert sorted(parsed) == sorted(once + twice)
    assert samples["kept"][0].duration_s == pools["kept"][0].duration_s == 16.0
    assert samples["header"][0].duration_s == pools["header"][0].duration_s == 12.0
