"""Every layout equals a single process: loss, every gradient, and weights after updates."""

import functools
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_vrl.checkpoint.peft_files import write_peft
from megatron_vrl.config import Lora
from megatron_vrl.models.adapters import adapter_shapes
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.chunk import whole_model
from tests.models.layout_worker import LAYOUTS, LORA, train
from tests.running import ENVIRONMENT, ROOT, python
from tests.tiny_models import MODELS, save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a launch trains all its layouts
CASES = [(name, model) for name, layout in LAYOUTS.items() for model in layout.all_models]
LANGUAGE, VISION, MERGER = "language", "vision", "merger"


Trained = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """trained(layout, model) -> what `layout_worker.train` returned; each layout is run once."""
    directory = tmp_path_factory.mktemp("layouts")
    for name, make in MODELS.items():
        save(make(), directory / name)
        if "tied" in name:
            lora = Lora(**LORA["lora"])
            arch = read_architecture(directory / name)
            shapes = adapter_shapes(arch, lora, whole_model(arch))
            drawn = torch.Generator().manual_seed(4)
            factors = {n: 0.1 * torch.randn(shape, generator=drawn) for n, shape in shapes.items()}
            write_peft(directory / f"{name}-adapter", lora, name, factors)

    @functools.cache
    def launch(processes: int) -> None:
        command = [python(), "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "tests.models.layout_worker"]
        done = subprocess.run(
            [*command, str(directory)],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    @functools.cache
    def results(name: str, model: str) -> dict[str, Any]:
        layout = LAYOUTS[name]
        if layout.processes == 1:
            return train(directory / model, layout)
        launch(layout.processes)
        result: dict[str, Any] = torch.load(directory / f"{name}-{model}.pt")
        return result

    return results


@pytest.mark.parametrize(("name", "model"), CASES)
def test_layout_equals_one_process(trained: Trained, name: str, model: str) -> None:
    _, is_frozen, frozen = name.partition("-frozen-")
    alone = "one-four-kv-heads" if "four-kv-heads" in model else "one" + is_frozen + frozen
    alone = "one-lora" if name.endswith("-lora") else alone
    one = trained(alone, model)
    many = trained(name, model)
    for metric in ("loss", "grad_norm", "entropy", "reference_gap_max"):
        torch.testing.assert_close(
            torch.tensor(many[metric]), torch.tensor(one[metric]), rtol=1e-5, atol=2e-6
        )
    for tensor, grad in many.get("grads", {}).items():
        wanted = one["grads"][tensor]
        if not wanted.isnan().any():
            error = (grad - wanted).norm() / wanted.norm()
            assert error < 1e-5, f"{tensor}: relative error {error:.1e}"
    assert many["base"] == one["base"]
    for tensor, weight in many["weights"].items():
        error = (weight - one["weights"][tensor]).norm() / one["weights"][tensor].norm()
        assert error < 1e-4, f"{tensor}: relative error {error:.1e} after 2 updates"


@pytest.mark.parametrize(("name", "model"), [case for case in CASES if "lora" not in case[0]])
def test_reference_stays_where_the_policy_began(trained: Trained, name: str, model: str) -> None:
    gaps = trained(name, model)["reference_gap_max"]
    assert gaps[0] == 0.0  # the same numbers, by the same operations
    assert gaps[1] > 1e-3


@pytest.mark.parametrize("model", ["untied", "qwen3-untied"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if "frozen" in name])
def test_frozen_parts_have_no_gradient_and_stay(trained: Trained, name: str, model: str) -> None:
    frozen = name.partition("-frozen-")[2]
    result, free = trained(name, model), trained("one", model)
    start = MODELS[model]()
    for tensor, grad in result["grads"].items():
        if _part(tensor) == frozen:
            assert grad.isnan().all(), f"{tensor} has a gradient"
            assert torch.equal(result["weights"][tensor], _published(start, model)[tensor])
        else:
            assert grad.norm() > 0, f"{tensor} has none"
            direction = torch.cosine_similarity(grad.flatten(), free["grads"][tensor].flatten(), 0)
            assert direction > 1 - 1e-5  # clipping may scale it


def _part(tensor: str) -> str:
    if "merger" in tensor:
        return MERGER
    return VISION if "visual." in tensor else LANGUAGE


def _published(model: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    if kind.startswith("qwen3"):
        return dict(model.named_parameters())
    prefixes = {"model.visual.": "visual.", "model.language_model.": "model."}
    named: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        named[prefixes.get(prefix, "") + name.removeprefix(prefix)] = param
    return named


@pytest.mark.parametrize("name", ["pp2", "pp2-uneven", "pp4", "tp2-sp-pp2-distributed-optimizer"])
def test_stages_exchange_hidden_states_and_no_shapes(trained: Trained, name: str) -> None:
    """The last stage receives each micro-batch in each pass, and sends back its gradient."""
    result = trained(name, "tied")
    micro_batches = len(result["lengths"])
    assert len(set(result["lengths"])) > 1  # shapes differ
    updates, passes = 2, 4  # two forward passes of the reference model, two of the updates
    assert result["messages"] == {
        "irecv": passes * micro_batches,
        "isend": updates * micro_batches,
    }
