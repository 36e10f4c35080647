"""The command `mvrl`: its help, mistakes, completion, and what `doctor` finds."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_vrl import __main__ as mvrl
from megatron_vrl.cli import doctor, quickstart
from megatron_vrl.errors import ConfigError
from tests.running import ENVIRONMENT, ROOT, run_python


def run(*arguments: str) -> tuple[int, str, str]:
    done = run_python("-m", "megatron_vrl", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_help_has_one_line_for_each_command() -> None:
    code, out, err = run()
    assert (code, err) == (0, "") and out == mvrl.help_text() + "\n"
    lines = [line for line in out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(mvrl.COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


def test_version_is_that_of_the_package() -> None:
    assert run("--version") == (0, f"megatron_vrl {version('megatron_vrl')}\n", "")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("trian", "did you mean mvrl train?"), ("xyzzy", "mvrl --help lists the commands.")],
)
def test_an_unknown_command_is_one_sentence_with_the_nearest(name: str, hint: str) -> None:
    assert run(name) == (2, "", f"error: mvrl has no command {name!r}; {hint}\n")


def test_a_command_gets_its_arguments_and_stdin_and_its_exit_code_is_passed_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vrl", "grade", "--task", "multiple_choice"],
        cwd=ROOT,
        env=ENVIRONMENT,
        input="no JSON\n",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: line 1 is not JSON")


def test_a_command_is_the_main_module_of_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned children import the `__main__` of cli/train.py, which ends them with their parent."""
    replaced = []
    monkeypatch.setattr(os, "execv", lambda program, argv: replaced.append((program, argv)))
    mvrl.execute("check-data", ["--config", "a b"])
    module = "megatron_vrl.cli.check_data"
    argv = [sys.executable, "-m", module, "--config", "a b"]
    assert replaced == [(sys.executable, argv)]


def test_quickstart_needs_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert quickstart.SCRIPT.samefile(ROOT / "launch" / "quickstart.sh")
    monkeypatch.setattr(quickstart, "SCRIPT", tmp_path / "launch" / "quickstart.sh")
    monkeypatch.setattr(sys, "argv", ["quickstart"])
    with pytest.raises(ConfigError, match="needs the repository"):
        quickstart.main()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("mvrl", "conv"), "convert"),
        (("mvrl", "convert", "ver"), "verify"),
        (("mvrl", "grade", "--task", "multi"), "multiple_choice"),
        (("mvrl", "train", "--rollouts"), "--rollouts-only"),
    ],
)
def test_bash_completes_commands_options_and_choices(
    words: tuple[str, ...], answer: str, tmp_path: Path
) -> None:
    script = tmp_path / "completion"
    script.write_text(completion("bash"))
    typed = " ".join(words)
    program = f"""
source {script}
COMP_WORDS=({typed}) COMP_CWORD={len(words) - 1} COMP_LINE="{typed}" COMP_POINT={len(typed)}
$(complete -p mvrl | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert answer in done.stdout.split(), done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_completion(shell: str) -> None:
    assert "rollouts-only" in completion(shell)


def completion(shell: str) -> str:
    code, out, err = run("completion", shell)
    assert (code, err) == (0, "")
    return out


def test_doctor_finds_what_the_tests_need(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 0
    found = {line[:18].strip(): line for line in capsys.readouterr().out.splitlines()}
    for name in ("Python", "torch", "megatron-core", "vLLM", "PyAV", "memory", "disk"):
        assert found[name].split()[-1] and " ok " in found[name], name
    assert version("av") in found["PyAV"]


def test_doctor_says_what_is_missing_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setattr(doctor, "version", lambda name: version(f"no-such-{name}"))
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "megatron-core       MISSING  not installed: run launch/install.sh" in out
    assert out.endswith("Nothing runs yet; missing: megatron-core, vLLM.\n")
