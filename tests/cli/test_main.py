"""The command `mvrl`: its help, mistakes, completion, and what `doctor` finds."""

import os
import socket
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


@pytest.mark.parametrize(
    ("driver", "cuda", "status"),
    [
        ("580.65.06", "13.0", "ok"),
        ("570.124.06", "13.0", "MISSING"),
        ("570.124.06", "12.8", "ok"),
        ("", "13.0", "none"),
    ],
)
def test_doctor_compares_the_driver_with_cuda(driver: str, cuda: str, status: str) -> None:
    assert doctor._driver(driver, cuda).status == status


def test_doctor_names_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._versions().status == "ok"
    older = {"torch": "2.11.0", "transformer-engine": "2.9.0"}
    monkeypatch.setattr(doctor, "version", lambda name: older.get(name) or version(name))
    finding = doctor._versions()
    assert finding.status == "MISSING" and "torch 2.11.0 is not >=2.13" in finding.value
    assert "is made for 2.20." in doctor._transformer_engine().advice


def test_doctor_says_when_the_port_is_taken() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", doctor.PORT))
        server.listen()
        assert doctor._port().value == f"{doctor.PORT} is taken"


def test_doctor_says_what_is_missing_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setattr(doctor, "version", lambda name: version(f"no-such-{name}"))
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "megatron-core       MISSING  not installed: run launch/install.sh" in out
    assert out.endswith("Nothing runs yet; missing: megatron-core, vLLM.\n")
