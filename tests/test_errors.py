"""What a user can get wrong: one sentence on stderr, exit code 2, no traceback, nothing lost.

Where a function raises the error, it is asked directly; what only shows in a whole run is started
as a user starts it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_vrl.checkpoint.hf_reader import HFCheckpoint
from megatron_vrl.config import (
    Model,
    Parallel,
    Rewards,
    RunConfig,
    check_batches,
    check_dev,
    load_config,
)
from megatron_vrl.config.foreign_keys import FOREIGN
from megatron_vrl.errors import CheckpointError, ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.pipeline_split import check_divides
from megatron_vrl.models.precision import check_available
from megatron_vrl.rewards import weights_of
from megatron_vrl.trainer.state import RunState
from tests.running import CONFIG, ENVIRONMENT, ROOT, run_python, train_command
from tests.tiny_models import hf_model, save

SHORT = ("sft.steps=0", "grpo.steps=3", "grpo.evaluate_every=0", "rollout.prompts_per_step=2")
FAST = ("rollout.group_size=2", "video.decoder=pyav")


def sentence_of(done: subprocess.CompletedProcess) -> str:
    """The one error line of a program that failed as it should."""
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def run_in(folder: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        train_command(*SHORT, *FAST, *overrides, ranks=ranks),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )


# ---- config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("grpo.stpes=3", "Command line: unknown key 'grpo.stpes'; did you mean 'grpo.steps'?"),
        ("gpro.steps=3", "unknown key 'gpro'; did you mean 'grpo'?"),
        ("grpo.steps=three", "Command line: grpo.steps must be a whole number, not 'three'."),
        ("rollout.group_size=0", "Command line: rollout.group_size must be more than 0, not 0."),
        ("model.freeze_vision=7", "model.freeze_vision must be true or false, not 7."),
        ("grpo.optimizer.lr=x", "Command line: grpo.optimizer.lr must be a number, not 'x'."),
        ("video.decoder=pyva", "must be 'dali' or 'pyav', not 'pyva'; did you mean 'pyav'?"),
        ("algorithm.adv_estimator=grpo", "the key here is 'algorithm.name'."),
        ("actor_rollout_ref.rollout.n=4", "the key here is 'rollout.group_size'."),
        ("grpo.num_generations=4", "the key here is 'rollout.group_size'."),
        ("num_generations=4", "Write rollout.group_size=4."),
        ("data.train=nope.yaml", "nope.yaml cannot be read (No such file or directory)."),
        ("grpo", "Override 'grpo' is not of the form section.key=value."),
        ("grpo.steps=[", "Override 'grpo.steps=[': the value is not YAML."),
        ("model.checkpoint.x=1", "model.checkpoint is not a section."),
    ],
)
def test_config_mistakes(override, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, [override])
    assert sentence in str(error.value)


def test_config_file_that_is_missing_or_not_yaml(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read the config .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="holds a list, not sections"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"c\.yaml is empty\. See"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("run:\n\tout_dir: x\n")
    with pytest.raises(ConfigError, match="line 2 is indented with a tab; use spaces"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(CONFIG.read_text().replace("grpo:", "grpo:\n  stpes: 1", 1))
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown key 'grpo\.stpes'"):
        load_config(tmp_path / "c.yaml", ["grpo.steps=3"])


def test_every_foreign_name_leads_to_a_key_of_ours():
    for ours in FOREIGN.values():
        section = RunConfig
        for name in ours.split(".")[:-1]:
            section = section.model_fields[name].annotation
        assert ours.split(".")[-1] in section.model_fields


def test_a_step_smaller_than_the_replicas():
    cfg = load_config(ROOT / "configs/quickstart.yaml", ["rollout.prompts_per_step=3"])
    check_batches(cfg, 3)
    with pytest.raises(ConfigError, match="prompts_per_step=3 is less than the 4 model replicas"):
        check_batches(cfg, 4)


@pytest.mark.parametrize("key", ["sft.stop_metric", "grpo.evaluate_every"])
def test_a_look_at_a_split_that_is_not_there(key):
    without = ["data.evaluation.dev=[]", "sft.stop_metric=''", "grpo.evaluate_every=0"]
    values = {"sft.stop_metric": "temporal_grounding/miou", "grpo.evaluate_every": 30}
    config = ROOT / "configs/quickstart.yaml"
    check_dev(load_config(config, [*without, "grpo.steps=29", "grpo.evaluate_every=30"]))
    cfg = load_config(config, [*without, f"{key}={values[key]}"])
    with pytest.raises(ConfigError, match=rf"{key} needs the split data\.evaluation\.dev: name"):
        check_dev(cfg)


def test_a_weight_for_a_part_no_task_has():
    with pytest.raises(ConfigError, match=r"acuracy.*accuracy"):
        weights_of(Rewards(multiple_choice={"format": 0.5, "acuracy": 0.5}))


def test_program_prints_the_sentence_alone():
    done = run_python(
        "-m", "megatron_vrl.cli.train", "--config", CONFIG, "grpo.stpes=3", "--dry-run"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: Command line: unknown key 'grpo.stpes'; did you mean 'grpo.steps'?\n"
    )


@pytest.mark.parametrize(
    "program",
    [
        "megatron_vrl/cli/train.py",
        "tools/make_synthetic.py",
        "tools/make_tiny_model.py",
        "tools/convert_checkpoint.py",
    ],
)
def test_help_loads_nothing_heavy(program):
    code = f"""
import runpy, sys
sys.argv = ["x", "--help"]
sys.path.insert(0, "tools")
try:
    runpy.run_path({program!r}, run_name="__main__")
finally:
    print(*sys.modules, file=sys.stderr)
"""
    done = run_python("-c", code)
    assert "usage:" in done.stdout
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "megatron_vrl" in loaded
    assert not loaded & {"torch", "megatron", "transformers", "vllm", "nvidia", "wandb"}


# ---- layout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(hf_model(), tmp_path_factory.mktemp("errors") / "hf")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A whole checkpoint: a dry run reads its tokenizer and chat template, too."""
    directory = tmp_path_factory.mktemp("errors") / "whole"
    done = run_python(ROOT / "tools" / "make_tiny_model.py", "--out", directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"tensor": 3}, "parallel.tensor=3 does not divide the model's 4 attention heads"),
        ({"tensor": 4}, "parallel.tensor=4 does not divide the model's 2 KV heads"),
        (
            {"pipeline": 3},
            "parallel.pipeline=3 x parallel.virtual=1 does not divide the model's 4 layers",
        ),
        (
            {"pipeline": 2, "virtual": 4},
            "parallel.pipeline=2 x parallel.virtual=4 asks for more chunks than the model's 4",
        ),
        (
            {"pipeline": 2, "layers_per_chunk": [1, 2]},
            "parallel.layers_per_chunk=[1, 2] must hold pipeline x virtual = 2 counts that add up",
        ),
    ],
)
def test_sizes_that_do_not_divide(checkpoint, layout, sentence):
    with pytest.raises(ConfigError) as error:
        check_divides(read_architecture(checkpoint), Model(checkpoint=""), Parallel(**layout))
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"layers": "transformer_engine"},
            "model.layers=transformer_engine, but this machine has no GPU: set "
            "model.layers=megatron and model.fp8=none.",
        ),
        (
            {"layers": "fp8_emulated", "fp8": "current"},
            "model.layers=fp8_emulated with model.fp8=current and parallel.tensor=2: it rounds to "
            "FP8 on one tensor rank; set model.fp8 and parallel.tensor=1.",
        ),
        (
            {"fp8": "delayed"},
            "model.fp8=delayed is computed by Transformer Engine only: set "
            "model.layers=transformer_engine (rounded for a proof), or model.fp8=none.",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(model, sentence):
    with pytest.raises(ConfigError) as error:
        check_available(Model(checkpoint="", **model), Parallel(tensor=2), torch.device("cpu"))
    assert str(error.value) == sentence


# ---- checkpoint


def test_checkpoints_that_are_not_there_or_of_another_model(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"Cannot read .*nowhere"):
        read_architecture(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type='llama', not 'qwen2_5_vl'"):
        read_architecture(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["vision_config"]["window_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks the key 'window_size'"):
        read_architecture(tmp_path)


def test_missing_and_damaged_shards(tmp_path):
    directory = tmp_path / "sharded"
    hf_model().save_pretrained(directory, max_shard_size="200KB")
    arch = read_architecture(directory)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    whole = HFCheckpoint(directory, arch)
    with pytest.raises(CheckpointError, match=r"lacks the tensor visual\.nothing"):
        whole.tensor("visual.nothing")
    aside = shards[1].rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"lacks its shard {shards[1].name}"):
        HFCheckpoint(directory, arch)
    shards[1].write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is damaged"):
        HFCheckpoint(directory, arch)
    aside.rename(shards[1])
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"but no model\.safetensors, and no model"):
        HFCheckpoint(directory, arch)


# ---- a run that was stopped


def test_a_restarted_run_takes_back_the_rows_it_writes_again():
    assert RunState().next_row is None
    assert RunState(stage="sft", step=4).next_row == ("sft", 5)
    assert RunState(stage="grpo").next_row == ("grpo", 1)
    stage, step = RunState(stage="done").next_row  # type: ignore[misc]
    assert stage == "grpo" and step > 10**9  # none of them


# ---- whole runs


@pytest.fixture
def copy(quickstart, tmp_path):
    """The quickstart's folder again, with videos and annotations that may be spoiled."""
    run = tmp_path / "runs" / "quickstart"
    shutil.copytree(quickstart / "runs" / "quickstart" / "data", run / "data")
    for name in ("model-hf", "model-megatron"):
        (run / name).symlink_to(quickstart / "runs" / "quickstart" / name)
    return tmp_path


@pytest.mark.slow
def test_vanished_video_stops_a_strict_run_and_is_replaced_in_another(copy):
    from megatron_vrl.data.mix import SampleStream, load

    cfg = yaml.safe_load(CONFIG.read_text())
    sources = load_config(CONFIG).data.train
    sources = [s.model_copy(update={"json_path": str(copy / s.json_path)}) for s in sources]
    order = SampleStream(load(sources, cfg["run"]["seed"]), cfg["run"]["seed"]).take(6)
    video = copy / order[5].video  # of the third step
    assert order[5].video not in {sample.video for sample in order[:4]}
    run = copy / "runs" / "quickstart"

    aside = copy / "aside.mp4"
    video.rename(aside)
    done = run_in(copy, "video.max_bad_fraction=0")
    assert done.stderr.count("there was no update") == 1  # a fresh model: said of the first step
    assert sentence_of(done) == (
        "error: 1 of the 6 samples drawn have bad videos, over video.max_bad_fraction=0.0: 1 "
        f"missing (first {order[5].video}); see quarantine.jsonl, check the data with "
        "tools/check_data.py, or raise the limit."
    )
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows if '"phase": "grpo"' in row] == [1, 2]
    assert (run / "checkpoints" / "latest").read_text() == "grpo-0-000002"

    video.write_bytes(aside.read_bytes()[:2000])
    done = run_in(copy)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = (run / "metrics.jsonl").read_text().splitlines()
    assert whole[: len(rows)] == rows
    of_grpo = [json.loads(row) for row in whole if '"phase": "grpo"' in row]
    assert [row["step"] for row in of_grpo] == [1, 2, 3]
    assert [row["bad_samples"] for row in of_grpo] == [0, 0, 1]
    [bad] = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (bad["step"], bad["sample"], bad["video"]) == (3, order[5].id, order[5].video)
    assert bad["reason"].startswith(f"{order[5].video} cannot be opened as a video")


@pytest.mark.slow
def test_full_disk_ends_all_ranks(copy):
    """Rank 0 alone writes metrics; the other must not be left waiting."""
    run = copy / "runs" / "quickstart"
    (run / "metrics.jsonl").symlink_to("/dev/full")
    line = sentence_of(run_in(copy, ranks=2))
    assert "The disk is full: runs/quickstart/metrics.jsonl cannot grow" in line


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.checkpoint=nowhere", "Cannot read nowhere/config.json"),
        ("parallel.tensor=2", "needs a multiple of 2 processes"),
        ("grpo.mini_batches=3", "grpo.mini_batches=3 is more than the 2 groups of a step"),
    ],
)
def test_dry_run_finds_what_cannot_work(tmp_path, override, sentence):
    assert sentence in sentence_of(run_in(tmp_path, override, "--dry-run"))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_annotation_with_wrong_fields_names_file_and_record(copy):
    path = copy / "runs/quickstart/data/annotations/heldout_temporal_grounding.json"
    records = json.loads(path.read_text())
    name = list(records)[1]
    del records[name]["sentences"]
    path.write_text(json.dumps(records))
    line = sentence_of(run_in(copy, ranks=2))
    assert line.endswith(f"{path.name}: record '{name}': field 'sentences' is missing.")


def test_launcher_passes_the_sentence_on(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "train.sh"), "--config", str(tmp_path / "nowhere.yaml")],
        env=ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert "Cannot read the config" in sentence_of(done)


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, str(ROOT / "tools/config_reference.py")]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        program.stdout.close()  # long before the first line
        assert program.stderr.read() == b""
    assert program.returncode == 0


def test_another_broken_pipe_is_an_error():
    """For example to a process that decodes."""
    program = "def main(): raise BrokenPipeError('of a worker')\n"
    program += "from megatron_vrl.process.entry import run_program; run_program(main)"
    done = run_python("-c", program)
    assert done.returncode == 1 and "BrokenPipeError: of a worker" in done.stderr


@pytest.mark.slow
def test_a_folder_without_the_videos_is_one_sentence_while_a_checkpoint_is_written(copy):
    """The checkpoint before GRPO is in flight: its writer must not end in a traceback."""
    sources = yaml.safe_load(CONFIG.read_text())["data"]["train"]
    train = json.dumps([source | {"data_folder": "nowhere"} for source in sources])
    done = run_in(copy, "data.evaluation={}", f"data.train={train}", "observe.wandb=offline")
    line = sentence_of(done)
    assert "samples drawn have bad videos, over video.max_bad_fraction" in line
    assert done.stderr.splitlines()[-1] == line
    said = [line for line in done.stderr.splitlines() if line.startswith("Quarantined ")]
    assert "nowhere" in said[0] and len(said) == len(set(said)) <= 50
    assert all(" more: " in words for words in said[1:])
    assert (copy / "runs/quickstart/checkpoints/latest").read_text() == "grpo-0-000000"


def test_a_strict_dry_run_refuses_what_is_not_on_this_machine(with_tokenizer, tmp_path):
    options = (f"model.checkpoint={with_tokenizer}", "sft.steps=0", "video.device=gpu", "--dry-run")
    done = run_in(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "not on this machine" in line]
    assert "# not on this machine: a GPU, which video.device=gpu needs" in notes
    assert "# not on this machine: annotation file" in "\n".join(notes)
    line = sentence_of(run_in(tmp_path, *options, "--strict"))
    assert line.startswith("error: not on this machine: annotation file runs/quickstart/data/")
    assert line.endswith(", a GPU, which video.device=gpu needs.")


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (("--grpo.steps", "5"), "grpo.steps=5"),
        (("--grpo.steps=5",), "grpo.steps=5"),
        (("--run.out_dir", "--dry-run"), "run.out_dir=VALUE"),
    ],
)
def test_an_override_written_as_an_option_is_told_its_form(words, right):
    done = run_python("-m", "megatron_vrl.cli.train", "--config", CONFIG, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {words[0]} is not an option: write {right}.\n"


@pytest.mark.parametrize("out", ["taken", "taken/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_written_is_named_by_the_dry_run(
    with_tokenizer, tmp_path, out
):
    (tmp_path / "taken").touch()
    options = (f"model.checkpoint={with_tokenizer}", f"run.out_dir={out}", "--dry-run")
    line = sentence_of(run_in(tmp_path, *options))
    assert line.startswith(f"error: run.out_dir={out} cannot be written (")
