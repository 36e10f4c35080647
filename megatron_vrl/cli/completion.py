"""Print tab completion for a shell: commands, options, files and folders.

    eval "$(mvrl completion bash)"

mvrl completion zsh or tcsh prints the script of that shell. The library shtab writes it from the
parsers of all commands.
"""

import argparse
from importlib import import_module

from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

SHELLS = ("bash", "zsh", "tcsh")


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    parser.prog = "mvrl completion"
    parser.add_argument("shell", choices=SHELLS, help="shell to complete in")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    import shtab

    print(shtab.complete(whole_parser(), arguments.shell))


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser of `mvrl` with every command as a subparser."""
    import shtab

    from megatron_vrl.__main__ import COMMANDS

    parser = argparse.ArgumentParser(prog="mvrl")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    kinds = {"FILE": shtab.FILE, "CONFIG": shtab.FILE, "DIR": shtab.DIRECTORY}
    kinds |= {"RUN_DIR": shtab.DIRECTORY, "SRC": shtab.DIRECTORY, "DST": shtab.DIRECTORY}
    for name, text in COMMANDS.items():
        command = import_module(f"megatron_vrl.cli.{name.replace('-', '_')}").make_parser()
        for action in command._actions:
            if action.metavar in kinds:
                action.complete = kinds[action.metavar]
        commands.add_parser(name, help=text, parents=[command], add_help=False)
    return parser


if __name__ == "__main__":
    run_program(main)
