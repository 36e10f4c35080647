"""The command `mvrl`, also `python -m megatron_vrl`: start one of the commands below.

A command NAME is the module megatron_vrl/cli/NAME.py. This process is replaced by
`python -m megatron_vrl.cli.NAME ARGUMENTS`, so that processes which multiprocessing spawns import
the same `__main__` however the command was started (cli/train.py needs that).
"""

import difflib
import os
import sys
from typing import NoReturn

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.entry import run_program

COMMANDS = {  # name -> what it does, in the order of a first use
    "doctor": "list what this machine has and what can run on it",
    "quickstart": "from a clean clone to a report, with a tiny model",
    "check-data": "check annotations and videos before a run",
    "plan": "estimate memory and time of a step on GPUs that are not here",
    "select": "select training samples by the spread of their rewards",
    "train": "tune a model: supervised warm-up, then GRPO",
    "worker": "serve rollouts to trainers with rollout.placement=workers",
    "top": "follow a run from another terminal",
    "report": "build report.html of a run again",
    "evaluate": "evaluate a checkpoint or stored predictions on a benchmark",
    "ask": "ask a checkpoint one question about one video",
    "grade": "score stored responses, JSON lines to JSON lines",
    "score": "write the log-prob of every token of given responses",
    "convert": "convert between Hugging Face and Megatron checkpoints, or compare",
    "completion": "print tab completion for bash, zsh or tcsh",
}


def main() -> NoReturn:
    """Run the command named by the first argument. The console script `mvrl` calls this."""
    run_program(_dispatch, unblocked=frozenset())  # a rank keeps the signals that torchrun blocked


def _dispatch() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
    elif name == "--version":
        print(version())
    else:
        execute(name, arguments)


def help_text() -> str:
    """Return the help: one line for each command."""
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mvrl COMMAND [ARGUMENTS]",
            "",
            "Tune video language models with reinforcement learning on Megatron and vLLM.",
            "",
            *lines,
            "",
            "mvrl COMMAND --help lists the arguments; mvrl --version prints the version.",
        ]
    )


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return f"megatron_vrl {version_of('megatron_vrl')}"
    except PackageNotFoundError:
        raise ConfigError("megatron_vrl is not installed: run pip install -e . first.") from None


def execute(name: str, arguments: list[str]) -> NoReturn:
    """Replace this process by the command. Raise ConfigError if there is none of this name."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean mvrl {near[0]}?" if near else "; mvrl --help lists the commands."
        raise ConfigError(f"mvrl has no command {name!r}{hint}")
    module = f"megatron_vrl.cli.{name.replace('-', '_')}"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    main()
