"""tools/plan.py and dry runs over the shipped configs: refusals, nearest layout, search."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.cli import plan as program
from megatron_vrl.cli import train
from megatron_vrl.config import load_config
from megatron_vrl.errors import ConfigError, counted
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.qwen2_5_vl.family import FAMILY
from megatron_vrl.planner.hardware import GPUS, find_gpu
from megatron_vrl.planner.plan import Plan, PlanRequest, make_plan, refusals
from megatron_vrl.planner.speed import Machine
from megatron_vrl.planner.workload import (
    TEXT_TOKENS,
    packed_sizes,
    step_sizes,
    video_grid,
)
from megatron_vrl.process.entry import run_program
from tests.running import ROOT

READY = {  # parameters, and the GPU that the config is for
    "recipes/temporal_r1-3b": 3_754_622_976,
    "recipes/time_r1-3b": 3_754_622_976,
    "recipes/timelens-7b": 8_292_166_656,
    "recipes/timelens2-8b": 8_767_123_696,
    "recipes/videoauto_r1-7b": 8_292_166_656,
    "recipes/tempsamp_r1-7b": 8_292_166_656,
    "qwen2.5-vl-3b-1gpu": 3_754_622_976,
    "qwen2.5-vl-3b-8gpu": 3_754_622_976,
    "qwen2.5-vl-7b-tp2pp2": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b-tp8pp4-fp8": 73_410_777_344,
    "qwen3-vl-8b-8gpu": 8_767_123_696,
    "qwen2.5-vl-72b-lora-tp8": 73_410_777_344,
}


Planned = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Planned:
    """Exit code, stdout and stderr of the program."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: int | Path | str) -> tuple[int, str, str]:
        path = f"configs/{name}.yaml"
        monkeypatch.setattr(sys, "argv", ["plan.py", path, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_program(program.main)
        code = end.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


def as_json(answer: tuple[int, str, str]) -> tuple[int, dict[str, Any]]:
    code, out, _ = answer
    return code, json.loads(out)


@pytest.mark.parametrize("name", READY)
def test_ready_configs_pass_a_dry_run_and_fit(
    plan: Planned,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", "--config", f"configs/{name}.yaml", "--dry-run"])
    train.main()
    text = capsys.readouterr().out
    cfg = load_config(f"configs/{name}.yaml")
    assert f"# model: {READY[name]:,} parameters" in text
    assert f"# layout: {counted(cfg.parallel.processes, 'process')} = " in text
    code, found = as_json(plan(name, "--json"))
    assert (code, found["refused"], found["parameters"]) == (0, [], READY[name])
    assert found["gpus"] == cfg.parallel.processes > 0
    assert len(found["memory_bytes"]) == cfg.parallel.pipeline
    for stage in found["memory_bytes"].values():
        assert 0 < stage["peak"] == max(stage["update_peak"], stage["rollout_peak"])
        assert stage["peak"] <= found["usable_bytes"]
        assert stage["checkpoint_peak"] <= stage["peak"]
    assert found["host_memory_bytes"]["checkpoint_at_most"] > 0
    assert found["flops_per_step"] <= found["hardware_flops_per_step"]
    assert min(found["seconds_per_phase"].values()) > 0
    assert found["bounds"].keys() == found["seconds_per_phase"].keys()


def test_text_and_json_agree(plan: Planned) -> None:
    code, out, err = plan("qwen2.5-vl-7b-tp2pp2")
    _, found = as_json(plan("qwen2.5-vl-7b-tp2pp2", "--json"))
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 45 and max(map(len, out.splitlines())) <= 80
    peaks = [stage["update_peak"] / 2**30 for stage in found["memory_bytes"].values()]
    (line,) = [line for line in out.splitlines() if line.startswith("an update, at most")]
    assert line.split()[-2:] == [f"{peak:.2f}" for peak in peaks]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("qwen2.5-vl-7b-tp2pp2", "parallel.tensor=3", "does not divide the model's 28 attention"),
        ("qwen2.5-vl-7b-tp2pp2", "parallel.pipeline=4", "lower one of them|needs a multiple of 8"),
        ("qwen2.5-vl-3b-8gpu", "parallel.sequence=true", "needs parallel.tensor > 1"),
        ("qwen2.5-vl-3b-8gpu", "rollout.prompts_per_step=4", "is less than the 8 model replicas"),
        ("qwen2.5-vl-3b-1gpu", "model.fp8=current", "is computed by Transformer Engine only"),
    ],
)
def test_refusals_use_the_messages_of_training(
    monkeypatch: pytest.MonkeyPatch, name: str, change: str, reason: str
) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load_config(f"configs/{name}.yaml", [change])
    arch = read_architecture(cfg.model.architecture)
    gpus = 12 if change == "parallel.pipeline=4" else cfg.parallel.processes
    found = " ".join(refusals(cfg, arch, GPUS["h100"], gpus))
    assert any(part in found for part in reason.split("|")), found


def test_an_invalid_layout_is_refused_with_the_nearest(plan: Planned) -> None:
    code, out, err = plan("qwen2.5-vl-7b-tp2pp2", "parallel.tensor=3", "--json")
    found = json.loads(out)
    assert code == 2 and len(err.splitlines()) == len(found["refused"]) == 2
    assert found["nearest"]["overrides"] == ["parallel.tensor=2"]
    assert found["nearest"]["gpus"] == 8


def test_too_little_memory_is_refused_and_the_nearest_fits(plan: Planned) -> None:
    name = "qwen2.5-vl-7b-tp2pp2"
    code, found = as_json(plan(name, "model.recompute_vision=none", "--json"))
    assert code == 2 and "the largest part is vision" in found["refused"][0]
    near = found["nearest"]
    assert near["overrides"] == ["model.recompute_vision=full"]
    again, fits = as_json(plan(name, *near["overrides"], "--json"))
    assert (again, fits["refused"]) == (0, [])
    assert fits["seconds_per_step"] == near["seconds_per_step"]


def test_an_engine_that_does_not_fit_moves_to_workers(plan: Planned) -> None:
    name = "qwen2.5-vl-72b-tp8pp4-fp8"
    code, found = as_json(plan(name, "rollout.placement=colocated", "--json"))
    assert code == 2
    assert found["nearest"]["changes"] == {"rollout.placement": "workers"}
    assert (found["nearest"]["gpus"], found["nearest"]["worker_gpus"]) == (64, 32)
    _, out, _ = plan(name, "rollout.placement=colocated")
    text = " ".join(out[out.index("nearest: ") :].split())
    assert text.startswith("nearest: --gpus 64 rollout.placement=workers (64 GPUs and 32 GPUs of")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
def test_search_ranks_the_layouts_that_fit(plan: Planned) -> None:
    code, found = as_json(plan("qwen2.5-vl-3b-8gpu", "--search", "--json"))
    seconds = [layout["seconds_per_step"] for layout in found["layouts"]]
    assert code == 0 and seconds == sorted(seconds) and 5 < len(seconds) < found["tried"]
    assert all(layout["peak_bytes"] <= 80 * 2**30 for layout in found["layouts"])
    _, out, _ = plan("qwen2.5-vl-3b-8gpu", "--search")
    assert len(out.splitlines()) == 2 + 10


@pytest.mark.parametrize(
    "wrong", [["--gpus", 0], ["--mfu", 2], ["--prompt-tokens", 99999], ["--response-tokens", 0]]
)
def test_wrong_arguments_are_one_sentence(plan: Planned, wrong: list[int | str]) -> None:
    code, out, err = plan("qwen2.5-vl-3b-8gpu", *wrong)
    assert (code, out) == (2, "") and err.startswith("error: --") and err.count("\n") == 1


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match="h100"):
        find_gpu("v100")


def planned(*overrides: str, **question: Any) -> Plan:
    cfg = load_config(ROOT / "configs" / "qwen2.5-vl-3b-8gpu.yaml", list(overrides))
    arch = read_architecture(ROOT / cfg.model.architecture)
    return make_plan(cfg, arch, replace(PlanRequest(gpu=GPUS["h100"], gpus=8), **question))


def test_effects_of_options_on_memory_and_time() -> None:
    full = planned("model.recompute_num_layers=0")
    half = planned("model.recompute_num_layers=18")
    none = planned("model.recompute=none", "model.recompute_num_layers=0")
    tower = planned("model.recompute_num_layers=0", "model.recompute_vision=none")
    activations = [plan.memory.stages[0].activations for plan in (full, half, none)]
    assert activations[0] < activations[2] / 20
    assert activations[1] == pytest.approx((activations[0] + activations[2]) / 2, rel=1e-3)
    assert full.memory.stages[0].vision < tower.memory.stages[0].vision / 14
    seconds = [plan.phases["update"].seconds for plan in (none, half, full)]
    assert seconds == sorted(seconds) and seconds[0] < seconds[1] < seconds[2]
    assert tower.phases["update"].seconds < full.phases["update"].seconds
    assert planned("algorithm.kl=0").memory.stages[0].reference == 0
    assert "reference" not in planned("algorithm.kl=0").phases
    tensor = planned("parallel.tensor=2", "parallel.sequence=true").memory.stages[0]
    assert tensor.vision == pytest.approx(full.memory.stages[0].vision / 2, rel=0.1)
    full = planned()
    assert planned(mfu=0.2).phases["update"].seconds == pytest.approx(
        2 * full.phases["update"].seconds
    )
    short = planned(response=100)
    assert short.tokens < full.tokens and short.seconds < full.seconds


def test_a_frozen_tower_runs_once_for_all_passes_of_a_step() -> None:
    frozen = ("model.freeze_vision=true", "model.recompute_vision=none", "grpo.epochs=2")
    kept, again = planned(*frozen), planned(*frozen, "model.vision_output_cache_mib=0")
    patches = 4 * kept.sizes.vision_tokens * kept.micro_batches * kept.batch.groups
    assert kept.memory.stages[0].vision_outputs >= patches * 1280 * 2  # 1280 channels of bfloat16
    assert again.memory.stages[0].vision_outputs == 0
    for phase in ("reference", "update"):  # after "old log-probs", which encodes
        assert kept.phases[phase].seconds < again.phases[phase].seconds
    assert kept.phases["old log-probs"] == again.phases["old log-probs"]
    alone = planned(*frozen, "algorithm.kl=0", "grpo.epochs=1")
    assert alone.memory.stages[0].vision_outputs == 0  # one pass


def test_sizes_of_a_prompt() -> None:
    cfg = load_config(ROOT / "configs" / "qwen2.5-vl-3b-8gpu.yaml")
    t, h, w = video_grid(cfg.video, FAMILY.pixels)
    tokens = t * h * w // 4
    assert 0.95 * 2048 < tokens <= 2048  # the budget, 1605632 pixels of 28 x 28
    sizes = step_sizes(cfg, FAMILY)
    assert (sizes.prompt, sizes.vision_tokens) == (tokens + TEXT_TOKENS, tokens)
    assert sizes.rows == sizes.prompt + 8 * 1023
    small = step_sizes(cfg, FAMILY, prompt=700)
    assert small.vision_tokens <= 700 - TEXT_TOKENS


def test_rewards_of_temporal_sensitivity_are_counted() -> None:
    plain = planned("model.freeze_vision=true")
    scored = planned("model.freeze_vision=true", "rewards.temporal=shuffled_boundaries")
    assert set(scored.phases) - set(plain.phases) == {"shuffled frames"}
    assert scored.phases["shuffled frames"].seconds > 0
    assert scored.hardware_flops > plain.hardware_flops
    answered = planned("rewards.temporal=shuffled_group")
    more = answered.phases["rollout"].seconds / plain.phases["rollout"].seconds
    assert 1 < more <= 1.5 + 1e-9  # 4 answers beside 8, decoded together
    in_reward = ["algorithm.kl_in=reward", "algorithm.kl_estimator=k1"]
    assert "reward KL" in planned(*in_reward).phases


def test_textual_timestamps_are_tokens_of_the_prompt() -> None:
    cfg = load_config(ROOT / "configs" / "qwen2.5-vl-3b-8gpu.yaml", ["data.timestamps=interleaved"])
    t, h, w = video_grid(cfg.video, FAMILY.pixels)
    sizes = step_sizes(cfg, FAMILY)
    assert sizes.grid == (t, h, w)
    assert sizes.prompt == t * (h * w // 4 + FAMILY.interleaved_prompt.step_text) + TEXT_TOKENS
    steps, *_ = step_sizes(cfg, FAMILY, prompt=sizes.prompt - 1).grid or (0,)
    assert steps == t - 1


def test_a_prompt_has_the_text_between_temporal_steps() -> None:
    cfg = load_config(ROOT / "configs" / "qwen2.5-vl-3b-8gpu.yaml")
    family = replace(FAMILY, prompt=replace(FAMILY.prompt, step_text=10))
    steps, plain = video_grid(cfg.video, FAMILY.pixels)[0], step_sizes(cfg, FAMILY)
    assert step_sizes(cfg, family).prompt == plain.prompt + 10 * steps
    for room in (1, 10, 11, 200, 700):
        sizes = step_sizes(cfg, family, prompt=TEXT_TOKENS + room)
        shown = sizes.vision_tokens + 10 * (sizes.grid or (0,))[0]
        assert (sizes.grid is None) == (room <= 10) and shown <= room


MEASURED = {
    "name": "box",
    "flops": {"float32": 1e11},
    "memory": 2**34,
    "hbm": 1e10,
    "link": 1e9,
    "network": 1e8,
    "host": 1e10,
    "latency": 1e-4,
    "per_node": 4,
}


def test_a_measured_machine_is_planned_for(tmp_path: Path, plan: Planned) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps(MEASURED | {"measured": "beside these, when and how"}))
    box = find_gpu(str(path))
    assert (box.peak("float32"), box.peak("bfloat16")) == (1e11, None)
    code, _, err = plan("qwen2.5-vl-3b-8gpu", "--gpu", path)
    assert code == 2 and "the measured machine box has no rate for it" in err
    machine = Machine(gpu=box, gpus=8, mfu=1.0)
    near = machine.link(1e9, span=4, calls=10, ranks=4)
    far = machine.link(1e9, span=8, calls=10, ranks=8)
    assert near[0] == "NVLink" and near[1] == pytest.approx(1.0 + 10 * 2 * 1e-4)
    assert far[0] == "network" and far[1] == pytest.approx(10.0 + 10 * 3 * 1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"link": 0}, "link must be more than 0, not 0"),
        ({"latency": None}, "latency"),
        ({"hbm": "absent"}, "'hbm'"),
    ],
)
def test_a_damaged_machine_file_is_refused(
    tmp_path: Path, change: dict[str, int | str | None], named: str
) -> None:
    path = tmp_path / "box.json"
    given = MEASURED | change
    path.write_text(json.dumps({k: v for k, v in given.items() if v != "absent"}))
    with pytest.raises(ConfigError, match=named):
        find_gpu(str(path))


@pytest.mark.parametrize(("layout", "counts"), [("shared", (9, 1)), ("plain", (1, 9))])
def test_the_annotation_is_packed_as_one_more_answer(layout: str, counts: tuple[int, int]) -> None:
    change = ["algorithm.ground_truth_answer=in_group", f"batch.layout={layout}"]
    change += ["rollout.group_size=8"]
    cfg = load_config(ROOT / "configs" / "qwen2.5-vl-3b-8gpu.yaml", change)
    piece, pieces = packed_sizes(cfg, step_sizes(cfg, FAMILY))
    assert (piece.answers, pieces) == counts
