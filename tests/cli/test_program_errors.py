"""Programs end on a mistake with one line on stderr, exit code 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import CONFIG, ENVIRONMENT, ROOT, run_python, sentence_of


def test_program_prints_the_sentence_alone() -> None:
    done = run_python(
        "-m", "megatron_vrl.cli.train", "--config", CONFIG, "grpo.stpes=3", "--dry-run"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: Command line: unknown key 'grpo.stpes'; did you mean 'grpo.steps'?\n"
    )


def test_the_launcher_prints_the_programs_error(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "train.sh"), "--config", str(tmp_path / "nowhere.yaml")],
        env=ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert "Cannot read the config" in sentence_of(done)


def test_a_closed_stdout_is_no_error() -> None:
    command = [sys.executable, str(ROOT / "tools/config_reference.py")]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()  # long before the first line
        assert program.stderr.read() == b""
    assert program.returncode == 0


def test_another_broken_pipe_is_an_error() -> None:
    """Write to a closed pipe of another process, for example one that decodes."""
    program = "def main(): raise BrokenPipeError('of a worker')\n"
    program += "from megatron_vrl.process.entry import run_program; run_program(main)"
    done = run_python("-c", program)
    assert done.returncode == 1 and "BrokenPipeError: of a worker" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "correct"),
    [
        (("--grpo.steps", "5"), "grpo.steps=5"),
        (("--grpo.steps=5",), "grpo.steps=5"),
        (("--run.out_dir", "--dry-run"), "run.out_dir=VALUE"),
    ],
)
def test_the_error_for_an_override_as_option_names_the_form(
    arguments: tuple[str, ...], correct: str
) -> None:
    done = run_python("-m", "megatron_vrl.cli.train", "--config", CONFIG, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {arguments[0]} is not an option: write {correct}.\n"


@pytest.mark.parametrize(
    ("tool", "arguments", "sentence"),
    [
        ("grade.py", (), "the following arguments are required: --task; see mvrl grade --help."),
        (
            "grade.py",
            ("--task", "multiple_choice", "--mod", "x"),
            "argument --mode: invalid choice: 'x' (choose from 'strict', 'answer_only', "
            "'temporal_r1'); see mvrl grade --help.",
        ),
        (
            "check_data.py",
            ("--config", "c.yaml", "--decod3"),
            "unrecognized arguments: --decod3 (did you mean --decode?); see mvrl check-data "
            "--help.",
        ),
        (
            "convert_checkpoint.py",
            ("to-hf", "a", "b"),
            "argument direction: invalid choice: 'to-hf' (choose from 'hf-to-megatron', "
            "'megatron-to-hf', 'megatron-to-peft', 'verify'); see mvrl convert --help.",
        ),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    tool: str, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run_python(ROOT / "tools" / tool, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {sentence}\n")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("a: [", "is not YAML: "),
        ("- a", "has no list `datasets` of sources"),
    ],
)
def test_the_error_for_a_wrong_pool_names_its_option(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    pool = tmp_path / "pool.yaml"
    if content is not None:
        pool.write_text(content)
    arguments = ("--config", CONFIG, "--pool", pool, "--out", tmp_path / "out")
    done = run_python(ROOT / "tools" / "select_data.py", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --pool {pool} {reason}")
    assert done.stderr.endswith(": correct it.\n") and done.stderr.count("\n") == 1
