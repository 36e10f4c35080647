"""Command-line parsers.

The docstring of a command's module is its help text. The error for a wrong argument is one
sentence.
"""

import argparse
import difflib
import re
import sys
import textwrap
from typing import NoReturn

from megatron_vrl.errors import EXIT_CODE

OVERRIDE_HELP = "set a key of the configuration; the value is YAML (docs/config.md)"
_OPTION = re.compile(r"--\w+\.[\w.]+(=.*)?")  # a key written as an option: --grpo.steps
_USAGE = re.compile(r"^    (?:mvrl |\S+\.(?:py|sh)\b).*\n(?:    .*\n)*\n?", re.MULTILINE)


def protocol_name(text: str) -> str:
    """Return the name of a scoring protocol for an option that also accepts the name `seed`.

    `seed` is the earlier name of `temporal_r1`; a note on stderr says so.
    """
    if text != "seed":
        return text
    print("note: `seed` is now called `temporal_r1`.", file=sys.stderr)
    return "temporal_r1"


class OverrideParser(argparse.ArgumentParser):
    """Argument parser whose errors are one sentence and exit code 2.

    The error for `--grpo.steps 5` names the correct form, `grpo.steps=5`. The error for an unknown
    option names the nearest known option.
    """

    def error(self, message: str) -> NoReturn:
        arguments = sys.argv[1:]
        for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
            if _OPTION.fullmatch(argument):
                key, _, value = argument.removeprefix("--").partition("=")
                value = value or ("VALUE" if following.startswith("-") else following or "VALUE")
                self.exit(EXIT_CODE, f"error: {argument} is not an option: write {key}={value}.\n")
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        nearest = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        hint = f" (did you mean {nearest[0]}?)" if unknown.startswith("--") and nearest else ""
        self.exit(EXIT_CODE, f"error: {message.rstrip('.')}{hint}; see {self.prog} --help.\n")

    def add_overrides(self, text: str = OVERRIDE_HELP) -> None:
        """Add the positional arguments `section.key=value ...`, read as `arguments.overrides`."""
        self.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)


def tool_parser(doc: str | None) -> OverrideParser:
    """Return a parser whose help is the docstring of a command or tool.

    The first indented block of commands (`mvrl NAME ...` or `NAME.py ...`) becomes the usage, the
    rest the description. A docstring without such a block gets argparse's own usage.
    """
    text = doc or ""
    parser = OverrideParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    if block := _USAGE.search(text):
        lines = textwrap.dedent(block[0]).strip().splitlines()
        first, second, *_ = [*lines[0].split(), ""]
        parser.prog = f"{first} {second}" if first == "mvrl" else first
        parser.usage = "\n       ".join(lines).replace("%", "%%")
        text = text[: block.start()] + text[block.end() :]
    parser.description = text.strip()
    return parser
