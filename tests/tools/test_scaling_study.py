"""tools/scaling_study.py: its arithmetic, what it refuses, and a grid of one and two ranks."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from scaling import launch, simulate, tables
from scaling.grid import Cell, Layout, Study, cells, ideal_bubble
from scaling.predict import IDLE, fitted_mfu, predicted, update_parts
from scaling.rank import message_kind, union

from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.planner.hardware import GPUS, Gpu
from megatron_vrl.process.entry import run_program
from tests.running import ROOT, run_python

TOOL = ROOT / "tools" / "scaling_study.py"
ARCH = read_architecture(ROOT / "configs" / "models" / "qwen2.5-vl-3b.json")
NODES = launch.Nodes(count=2, rank=0, per_node=4, address="node0", port=29600, units=2)


def box(**changes: Any) -> Gpu:
    measured: dict[str, Any] = {
        "flops": {"float32": 1e13},
        "link_fraction": 1.0,
        "hbm_fraction": 1.0,
        "latency": 1e-5,
    }
    return replace(GPUS["h100"], **(measured | changes))


def cell(prompts: int = 8, mode: Literal["strong", "weak"] = "strong", **layout: Any) -> Cell:
    return Cell(mode=mode, size="tiny", layout=Layout(**layout), prompts=prompts)


def row(**values: float | str) -> dict[str, float | str]:
    given: dict[str, float | str] = {
        "mode": "strong",
        "size": "tiny",
        "ranks": 1,
        "units": 4,
        "prompts": 8,
    }
    if "seconds" in values:
        values["min_s"] = values["seconds"]
    return given | {"cell": f"of {values.get('ranks', 1)}"} | values


def test_efficiency_counts_each_core_once() -> None:
    rows = [
        row(ranks=2, seconds=5.0),
        row(seconds=8.0),
        row(ranks=4, seconds=2.0),
        row(ranks=8, seconds=2.0),  # two ranks a core, as fast as one rank a core
        row(ranks=4, seconds=8.0, mode="weak", prompts=32),
        row(ranks=1, seconds=8.0, mode="weak"),
        row(ranks=8, failed="why"),
    ]
    compared = tables.with_efficiency(rows)
    assert [each.get("efficiency") for each in compared] == [0.8, 1.0, 1.0, 1.0, 1.0, 1.0, None]
    assert compared[0]["base"] == "of 1"


def test_the_bubble_equals_that_of_the_schedule() -> None:
    assert ideal_bubble(cell(prompts=4)) == 0
    assert ideal_bubble(cell(prompts=4, pipeline=4)) == pytest.approx(3 / 7)
    assert ideal_bubble(cell(prompts=4, pipeline=4, data=2)) == pytest.approx(3 / 5)
    assert ideal_bubble(cell(prompts=4, pipeline=2, virtual=2)) == pytest.approx(1 / 9)


def test_messages_that_overlap_are_counted_once() -> None:
    assert union([]) == 0
    assert union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    kinds = [message_kind(name, on_gpu=False) for name in ("gloo:recv", "gloo:all_reduce", "mm")]
    assert kinds == ["p2p", "collective", ""]
    on_gpu = ("ncclDevKernel_SendRecv(ncclDevComm*)", "ncclDevKernel_AllReduce_Sum_f32", "gemm")
    assert [message_kind(name, on_gpu=True) for name in on_gpu] == kinds


def test_weak_cells_grow_with_the_ranks_and_the_fewest_ranks_come_first() -> None:
    study = Study.model_validate({"grid": {"layouts": [{"data": 2, "tensor": 2}, {}]}})
    found = [(each.name, each.prompts) for each in cells(study)]
    assert found == [
        ("strong/tiny/d1t1p1c1", 4),
        ("weak/tiny/d1t1p1c1", 4),
        ("strong/tiny/d2t2p1c1", 4),
        ("weak/tiny/d2t2p1c1", 16),
    ]


def test_a_fitted_cell_is_planned_as_it_was_measured() -> None:
    work = Study().work
    mfu = fitted_mfu(cell(), work, ARCH, box(), seconds=50.0)
    parts = update_parts(cell(), work, ARCH, box(), mfu)
    assert sum(parts.values()) == pytest.approx(50.0) and 0 < mfu < 1
    assert fitted_mfu(cell(), work, ARCH, box(), seconds=1e-9) == 1.0


def test_ranks_that_share_a_core_are_planned_to_share_its_rate() -> None:
    parts = {"compute": 3.0, IDLE: 1.0, "network": 1.0}
    alone = predicted(parts, ranks=2, units=2)
    assert (alone["seconds"], alone["communication"], alone["idle"]) == (5.0, 0.2, 0.2)
    shared = predicted(parts, ranks=4, units=2)
    assert (shared["seconds"], shared["communication"], shared["idle"]) == (8.0, 0.25, 0.0)


def simulated(gpu: Gpu, **asked: int) -> dict[str, list[dict[str, Any]]]:
    study = Study.model_validate({"simulate": asked})
    rows = list(simulate.simulated_sizes(study, {"tiny": ARCH}, gpu, {"tiny": 0.5}))
    return {mode: [r for r in rows if r["mode"] == mode] for mode in ("strong", "weak")}


def test_a_simulation_has_its_limits_and_says_what_it_is() -> None:
    free = box(nvlink=1e30, network=1e30, hbm=1e30, latency=0.0)
    found = simulated(free)
    for rows in found.values():  # no messages: nothing is lost
        assert [r["efficiency"] for r in rows] == pytest.approx([1.0] * len(rows))
        assert all(r["simulated"] is True and r["pieces"] for r in rows)
    real = simulated(box())
    for mode, rows in real.items():
        efficiencies = [r["efficiency"] for r in rows]
        assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[-1] < 0.999, mode
    assert [r["gpus"] for r in real["weak"]][-1] == 1024
    seconds = [r["seconds"] for r in real["strong"]]
    assert seconds == sorted(seconds, reverse=True)
    slow = simulated(box(network=1e9))
    assert slow["weak"][-1]["seconds"] > real["weak"][-1]["seconds"]
    few = simulated(box(), prompts=8)["strong"]
    assert [("refused" in r) for r in few] == [r["gpus"] > 8 for r in few]


def test_ready_configs_are_simulated_up_to_1024_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = "configs/qwen2.5-vl-7b-tp2pp2.yaml"
    given = {"configs": [config], "mfu": 0.2, "source": "nowhere"}
    study = Study.model_validate({"simulate": given})
    rows = list(simulate.simulated_configs(study, GPUS["h100"], 0.2, {"mfu": "nowhere"}))
    assert [r["gpus"] for r in rows if r["mode"] == "weak"] == [2**k for k in range(2, 11)]
    weak = [r for r in rows if r["mode"] == "weak" and "seconds" in r]
    assert weak[-1]["gpus"] == 1024 and 0 < weak[-1]["efficiency"] <= 1.0
    assert weak[0]["efficiency"] == 1.0
    text = tables.table([], rows, {"name": "x", "flops": {}, "link": 1, "latency": 0})
    assert "**Simulated, not run:**" in text and "mfu: nowhere" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--out is missing"),
        (["--config", "absent.yaml"], "Cannot read the config absent.yaml"),
        (["grid.modes=[stong]"], "did you mean 'strong'?"),
        (["grid.layouts=[]"], "grid.layouts is empty"),
        (["grid.sizes={a/b: {}}"], "grid.sizes has the name 'a/b'"),
        (["work.promts=3"], "did you mean 'work.prompts'?"),
        (["work.height=50"], "work.height must be a multiple of 28, not 50"),
        (["simulate.mfu=0.3"], "say where it was measured"),
        (["simulate.configs=[x.yaml]"], "simulate.size='' is not a size of the grid"),
        (
            ["simulate.configs=[x]", "simulate.mfu=1", "simulate.source=y", "simulate.gpu=z"],
            "--gpu z is not in the table",
        ),
        (["--rdzv-endpoint", "here"], "--rdzv-endpoint here is not HOST:PORT"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2 of --nnodes 2"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    import scaling_study

    out = ["--out", str(tmp_path / "out")] if arguments else []
    monkeypatch.setattr(sys, "argv", ["scaling_study.py", *out, *arguments])
    with pytest.raises(SystemExit) as end:
        run_program(scaling_study.main)
    assert end.value.code == 2
    compared = capsys.readouterr().err
    assert compared.startswith("error: ") and words in compared and compared.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_cells_that_cannot_run_name_the_reason() -> None:
    study = Study()
    for wrong, words in {
        cell(data=16): "16 ranks cannot run on 2 nodes of 4",
        cell(data=2, prompts=1): "work.prompts=1 is less than the 2 data ranks",
        cell(tensor=4): "parallel.tensor=4 does not divide the model's 2 KV heads",
    }.items():
        with pytest.raises(ConfigError, match=words):
            launch.check_cell(wrong, study, ARCH, NODES)
    launch.check_cell(cell(data=8), study, ARCH, NODES)
    assert launch.sentence("W\nerror: no such thing.\nmore") == "no such thing."
    assert launch.sentence("Traceback:\n  x\nRuntimeError: boom\nt.ChildFailedError: \n") == (
        "RuntimeError: boom"
    )


@pytest.mark.slow
def test_a_grid_of_one_and_two_ranks(tmp_path: Path) -> None:
    """Also a layout that the model refuses, and that a second call finds all of it finished."""
    options = [
        "grid.layouts=[{}, {pipeline: 2}, {tensor: 4}]",
        "grid.modes=[strong]",
        *("work.prompts=2", "work.answers=2", "work.answer_tokens=8", "work.frames=2"),
        "rounds.timed=1",
        "simulate.gpus=[1, 1024]",
    ]
    command = (TOOL, "--out", tmp_path, *options)
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("scaling: 2 cells, 1 failed")
    rows = [json.loads(line) for line in (tmp_path / "planned.jsonl").read_text().splitlines()]
    one, two, refused = rows
    assert refused["failed"].startswith("parallel.tensor=4 does not divide")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)  # the same work, cut otherwise
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert one["planned"]["seconds"] == pytest.approx(one["min_s"])
    assert one["idle"] == 0 and 0 < two["idle"] < 1 and len(two["idle_by_stage"]) == 2
    assert two["ideal_bubble"] == pytest.approx(1 / 3)
    assert one["efficiency"] == 1 and two["efficiency"] > 0
    simulated = [json.loads(s) for s in (tmp_path / "simulated.jsonl").read_text().splitlines()]
    assert {r["simulated"] for r in simulated} == {True} and len(simulated) == 4
    assert "Simulated, not run" in (tmp_path / "table.md").read_text()
    for name in ("measured.png", "simulated.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    again = (tmp_path / "study.jsonl").read_text()
    assert run_python(*command).returncode == 0
    assert (tmp_path / "study.jsonl").read_text() == again
