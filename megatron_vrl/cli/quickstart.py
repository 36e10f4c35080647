"""Go from a clean clone to a report on a machine without a GPU, by launch/quickstart.sh.

    mvrl quickstart [section.key=value ...]

The script installs the locked packages into .venv, makes synthetic clips and a tiny model, warms
the model up, trains it with GRPO and writes runs/quickstart/report.html. The same command resumes a
stopped quickstart. Overrides are those of `mvrl train`, for example grpo.steps=5.
"""

import os
from pathlib import Path
from typing import NoReturn

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program

SCRIPT = Path(__file__).parents[2] / "launch" / "quickstart.sh"


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    parser.add_overrides()
    return parser


def main() -> NoReturn:
    """Replace this process by the script. Raise ConfigError where there is no checkout."""
    arguments = make_parser().parse_args()
    if not SCRIPT.is_file():
        raise ConfigError(
            f"{SCRIPT} is not there: mvrl quickstart needs the repository. Clone it and run "
            "launch/quickstart.sh."
        )
    os.execv("/bin/bash", ["bash", str(SCRIPT), *arguments.overrides])


if __name__ == "__main__":
    run_program(main)
