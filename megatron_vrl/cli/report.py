"""Build report.html of a run again, also while the run goes on.

    mvrl report RUN_DIR

The page is built from the files in RUN_DIR alone and replaces RUN_DIR/report.html.
"""

from pathlib import Path

from megatron_vrl.process.command_line import OverrideParser, tool_parser
from megatron_vrl.process.entry import run_program


def make_parser() -> OverrideParser:
    parser = tool_parser(__doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run.out_dir of a run")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    from megatron_vrl.observe.progress import log_written
    from megatron_vrl.observe.report import build_report

    log_written(build_report(arguments.run))


if __name__ == "__main__":
    run_program(main)
