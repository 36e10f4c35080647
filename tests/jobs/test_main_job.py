"""The main job from the command line, small: in three layouts, killed and continued, its files."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_vrl.checkpoint.convert import compare
from megatron_vrl.errors import CheckpointError
from megatron_vrl.rollout.records import read_rollouts
from tests.running import ENVIRONMENT, ROOT, kill_job, run_python, train_command

SMALL = (
    "sft.stop_metric=''",
    "sft.steps=80",
    "sft.batch_size=20",
    "sft.optimizer.lr=3e-3",
    "sft.optimizer.warmup_steps=5",
    "grpo.steps=4",
    "grpo.evaluate_every=2",
    "rollout.prompts_per_step=4",
    "algorithm.kl=0.01",
    "algorithm.dynamic_sampling_rounds=2",
    "algorithm.ground_truth_answer=none",
    "rewards.temporal=shuffled_group",
    "checkpoint.every_steps=1000",
    "observe.profile_steps=[3]",
    "observe.profile_ranks=[1]",
)
ONE_STEP = (  # without a warm-up no answer earns a reward: all groups are uniform
    "algorithm.ground_truth_answer=none",
    "rewards.temporal=shuffled_boundaries",
    "sft.steps=0",
    "grpo.steps=1",
    "algorithm.drop_zero_variance_groups=false",
    "observe.wandb=disabled",
)
SEVERAL_UPDATES = ("grpo.mini_batches=2", "grpo.epochs=2", "algorithm.rollout_is=sequence")
KL_IN_REWARD = ("algorithm.name=reinforce_plus_plus", "algorithm.kl_in=reward")
LAYOUTS = {
    "tensor": ["parallel.tensor=2", *ONE_STEP, *SEVERAL_UPDATES],
    "pipeline": ["parallel.pipeline=2", *ONE_STEP, *KL_IN_REWARD],
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def rows_of(run: Path, phase: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that a repeated run must give again: all but those of the machine."""
    measured = ("perf/tokens_per_second", "tflops_per_second", "perf/peak_memory_gib")
    of_process = (
        "data/videos_decoded",
        "data/videos_from_store",
    )  # whose memory a restart has lost
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and not name.endswith((*measured, *of_process))
    }


def stored_answers(run: Path) -> list[tuple[Any, ...]]:
    return sorted(
        (row["step"], row["version"], row["sample"], answer["seed"], answer["token_ids"])
        for row in read_rollouts(run / "rollouts")
        for answer in row["answers"]
    )


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


Job = Callable[..., Path]


@pytest.fixture(scope="module")
def job(quickstart: Path) -> Job:
    """job(name, *overrides) -> run directory; one name is run once."""
    finished: dict[str, Path] = {}

    def run(name: str, *overrides: str) -> Path:
        if name not in finished:
            command = train_command(*SMALL, f"run.out_dir=runs/{name}", *overrides, ranks=2)
            # One is started as users start it, without a warm Python.
            environment = ENVIRONMENT | ({"WARM_SOCKET": ""} if name == "data" else {})
            done = subprocess.run(
                command, cwd=quickstart, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-4000:]
            assert done.stdout.splitlines()[-1] == f"report: runs/{name}/report.html"
            finished[name] = quickstart / "runs" / name
        return finished[name]

    return run


@pytest.fixture(scope="module")
def run(job: Job) -> Path:
    """Data parallel, the default."""
    return job("data")


def test_metrics_of_every_step_and_evaluation(run: Path) -> None:
    assert [row["step"] for row in rows_of(run, "sft")] == list(range(1, 81))
    grpo = rows_of(run, "grpo")
    assert [row["step"] for row in grpo] == [1, 2, 3, 4]
    for row in grpo:
        assert row.keys() >= {"reward/mean", "response_length/mean", "reward/format"}
        assert 0 <= row["reward/temporal"] <= 1
        assert 0 <= row["rollout/zero_iou_groups"] <= 1
        assert 0 <= row["rollout/zero_variance_groups"] <= 1
        assert row["timing_s"].keys() >= {"encode", "rollout", "score", "update"}
    assert any(row["reward/temporal"] > 0 for row in grpo)  # right answers, frames in order
    evaluations = [(row["during"], row["step"], row["split"]) for row in rows_of(run, "eval")]
    assert evaluations == [
        *[("base", 0, split) for split in ("heldout", "ood")],
        *[("sft", 80, split) for split in ("heldout", "ood")],
        *[("grpo", 2, "dev"), ("grpo", 4, "dev")],
        *[("grpo", 4, split) for split in ("heldout", "ood")],
    ]
    assert rows_of(run, "sft")[-1]["sft/loss"] < rows_of(run, "sft")[0]["sft/loss"] / 3


def test_a_traced_step_shows_its_phases(run: Path) -> None:
    """The profiler traces rank 1 alone; vLLM and Megatron work in the same process."""
    names = {file.name for file in (run / "traces").iterdir()}
    assert names == {f"{phase}-000003-rank0001.json.gz" for phase in ("sft", "grpo")}
    with gzip.open(run / "traces" / "grpo-000003-rank0001.json.gz") as trace:
        events = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert events >= {"sync", "rollout", "score", "update", "aten::mm"}


def test_summary_names_results_versions_and_seed(run: Path) -> None:
    summary = summary_of(run)
    assert summary["results"].keys() == {"base", "sft", "grpo"}
    for results in summary["results"].values():
        for split in ("heldout", "ood"):
            assert results[split].keys() >= {
                "reward/mean",
                "format_rate",
                "response_length/mean",
                "temporal_grounding/miou",
                "temporal_grounding/r1@0.5",
                "multiple_choice/accuracy",
            }
    assert summary["trivial"]["heldout"].keys() == {"whole video", "best constant"}
    assert (summary["seed"], summary["ranks"], summary["warm_up_restarts"]) == (1, 2, 0)
    assert summary["versions"].keys() >= {"torch", "megatron-core", "transformers"}
    assert summary["timing_s"].keys() >= {"evaluate", "rollout", "update"}
    assert 0 < summary["peak_rss_bytes"] < summary["peak_rss_bytes_all_ranks"] < 8 * 2**30
    assert summary["results"]["sft"]["heldout"]["format_rate"] == 1.0  # 80 steps teach the form


def test_export_loads_in_transformers_and_is_the_trained_model(run: Path) -> None:
    from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops

    declare_missing_ops()
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    load: Callable[..., Any] = Qwen2_5_VLForConditionalGeneration.from_pretrained
    model, notes = load(run / "export", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(run / "export")
    ids = processor.tokenizer("the red square is visible", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    done = run_python(ROOT / "tools" / "convert_checkpoint.py", "verify", run / "export", newest)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("tensors are bit-equal\n")
    asked = yaml.safe_load((run / "config.yaml").read_text())
    for directory in (run / "export", newest / "huggingface"):
        for section, kept in yaml.safe_load((directory / "inference.yaml").read_text()).items():
            assert kept.items() <= asked[section].items()
    shards = (run.parent / "quickstart" / "model-hf").glob("*.safetensors")
    start = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    trained = load_file(run / "export" / "model.safetensors")
    assert all(not torch.equal(trained[name], start[name]) for name in trained)
    result = json.loads((run / "summary.json").read_text())["results"]["grpo"]["heldout"]
    (row,) = re.findall(r"\| after GRPO \| ([\d.]+)", (run / "export" / "README.md").read_text())[
        :1
    ]
    assert row == f"{100 * result['temporal_grounding/miou']:.1f}"


def test_the_report_needs_no_other_file(run: Path) -> None:
    page = (run / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert not [source for source in sources if not source.startswith(("data:", "#"))]
    assert not re.search(r"@import|url\((?!['\"]?(data:|#))", page)
    for word in ("mIoU", "advantage", "warm-up"):
        assert word.lower() in page.lower()


def test_config_and_wandb_are_written(run: Path) -> None:
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["sft"]["steps"] == 80 and written["algorithm"]["kl"] == 0.01
    assert written["video"]["max_frames"] == 768  # a default
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("layout", ["data", *LAYOUTS])
def test_engine_and_trainer_agree_in_every_layout(job: Job, layout: str) -> None:
    for row in rows_of(job(layout, *LAYOUTS.get(layout, [])), "grpo"):
        assert row["rollout/logprob_gap_max"] < 1e-4


def test_ratios_of_several_updates_use_the_sampling_policy(job: Job) -> None:
    (row,) = rows_of(job("tensor", *LAYOUTS["tensor"]), "grpo")
    assert row["actor/skipped_updates"] == 0
    assert row["rollout/is_weight"] == pytest.approx(1, abs=1e-3)  # trainer beside engine
    assert abs(row["actor/ppo_kl"]) > 1e-6  # of the updates after the first
    assert row["actor/kl"] > 0


def test_kl_in_the_reward_is_not_in_the_loss(job: Job) -> None:
    (row,) = rows_of(job("pipeline", *LAYOUTS["pipeline"]), "grpo")
    assert row["reward/format"] == 0 and "actor/kl" not in row
    # The KL term is a component of the reward; engine and reference differ by rounding alone.
    assert 0 < abs(row["reward/mean"]) <= abs(row["reward/kl"]) < 1e-5
    # Engine and reference differ by rounding, which gives a group variance.
    assert row["rollout/zero_variance_groups"] < 1
    assert row["actor/ppo_kl"] == 0  # one update: on policy


def test_throughput_metrics_count_the_computed_tokens(run: Path) -> None:
    for row in rows_of(run, "grpo"):
        assert row["perf/tokens_computed"] >= row["perf/tokens_needed"] > 0
        assert row["perf/prompt_reuse"] > 1.3 and 0 <= row["perf/padding_fraction"] < 1
        assert row["perf/tflops_per_second"] > 0 and row["perf/peak_memory_gib"] > 0.2
        assert "perf/mfu" not in row  # the peak of a CPU is not known


def test_dropped_groups_are_replaced(run: Path) -> None:
    rows = rows_of(run, "grpo")
    assert max(row["rollout/rounds"] for row in rows) > 1
    for row in rows:
        if row["rollout/rounds"] < 3:  # then it did not end for want of rounds
            assert row["actor/groups_trained"] == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_generate_equal_answers_before_training(job: Job, run: Path, layout: str) -> None:
    other = job(layout, *LAYOUTS[layout])
    assert summary_of(other)["results"]["base"] == summary_of(run)["results"]["base"]


def test_a_killed_run_resumes_to_equal_results(job: Job, run: Path, quickstart: Path) -> None:
    """SIGKILL in the midst of GRPO; the same command then gives the same numbers."""
    out = quickstart / "runs" / "killed"
    began = "grpo-0-000000"  # where GRPO starts; kept for the KL term's reference
    shutil.copytree(run / "checkpoints" / began, out / "checkpoints" / began)
    overrides = ("checkpoint.every_steps=1", "observe.wandb=disabled")
    command = train_command(*SMALL, "run.out_dir=runs/killed", *overrides, ranks=2)
    with subprocess.Popen(
        command, cwd=quickstart, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        while not (out / "checkpoints" / "grpo-0-000002").exists():
            assert process.poll() is None, "finished or failed before it could be killed"
            time.sleep(0.05)
        kill_job(process)
    assert "done" not in (out / "checkpoints" / "latest").read_text()
    job("killed", *overrides)
    ours, theirs = rows_of(out, "grpo"), rows_of(run, "grpo")
    ours += rows_of(out, "eval")
    theirs += [row for row in rows_of(run, "eval") if row["during"] == "grpo"]
    assert len(ours) == len(theirs)
    for mine, whole in zip(ours, theirs, strict=True):
        assert numbers(mine) == pytest.approx(numbers(whole), rel=1e-6, abs=1e-6)
    assert stored_answers(out) == stored_answers(run)
    for stage, results in summary_of(run)["results"].items():
        for split, metrics in results.items():
            assert summary_of(out)["results"][stage][split] == pytest.approx(metrics)


def test_a_finished_run_only_prints_its_report(run: Path, quickstart: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = train_command(*SMALL, "run.out_dir=runs/data")
    done = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == (
        "runs/data is finished (4 of 4 steps); nothing was trained.\n"
        "report: runs/data/report.html\n"
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


STOCK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    ids = json.loads(sys.argv[2])
    llm = LLM(
        model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=2
    )
    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": ids}], wanted)
    steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    print(json.dumps([step[token].logprob for token, step in steps]))
"""


def test_export_loads_in_stock_vllm(run: Path, tmp_path: Path) -> None:
    """A process that imports nothing of ours: log-probs of a text equal transformers'."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    script = tmp_path / "stock.py"
    script.write_text(STOCK_VLLM)
    ids = list(range(30, 60))
    environment = ENVIRONMENT | {
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(run / "export"), json.dumps(ids)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "export").eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sft_ends_with_its_best_weights(quickstart: Path) -> None:
    """The first of two evaluations is the best: an untrained model earns 0 in both."""
    data = "runs/quickstart/data"
    sources = f"[{{json_path: {data}/annotations/dev_temporal_grounding.json, "
    sources += f"data_folder: {data}/videos, format: charades_sta}}]"
    command = train_command(
        "sft.steps=4",
        "sft.evaluate_every=2",
        "sft.stop_at=null",
        "sft.load_best_at_end=true",
        "sft.batch_size=4",
        "grpo.steps=0",
        "checkpoint.every_steps=4",
        "checkpoint.keep=4",
        "evaluation.before_training=false",
        f"data.evaluation={{dev: {sources}, heldout: {sources}}}",
        "observe.wandb=disabled",
        "run.out_dir=runs/best",
    )
    done = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = quickstart / "runs/best"
    assert "SFT ends with the weights of step 2 of 4: temporal_grounding/miou on" in done.stderr
    assert [(row["split"], row["step"]) for row in rows_of(run, "eval")] == [
        ("dev", 2),
        ("dev", 4),
        ("heldout", 4),
    ]
    assert len((run / "evaluations/sft-heldout.jsonl").read_text().splitlines()) == 3
    assert set(summary_of(run)["results"]) == {"sft"}
    assert compare(run / "export", run / "checkpoints/sft-0-000002", progress=False) > 0
    with pytest.raises(CheckpointError, match="differ"):
        compare(run / "export", run / "checkpoints/sft-0-000004", progress=False)


def test_sft_starts_over_once_and_then_fails(quickstart: Path) -> None:
    command = train_command(
        "sft.steps=4",
        "sft.evaluate_every=4",
        "sft.stop_at=0.99",
        "observe.wandb=disabled",
        "run.out_dir=runs/restart",
        ranks=2,
    )
    done = subprocess.run(command, cwd=quickstart, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "in 4 steps; starting over with seed 2." in done.stderr
    assert "error: SFT did not bring temporal_grounding/miou to 0.99" in done.stderr
    losses = [row["sft/loss"] for row in rows_of(quickstart / "runs/restart", "sft")]
    assert len(losses) == 8 and losses[4] > losses[3] + 1  # from the first weights again
